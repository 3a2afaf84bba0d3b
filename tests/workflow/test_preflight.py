"""Every missing thing is one line that names the fix, before any work starts."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from fluid_core.config import Recipe, load_recipe
from fluid_core.workflow import preflight

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def recipe(repository: Path, tmp_path: Path) -> Recipe:
    return load_recipe(repository / "configs" / "demo.yaml", [f"runs_dir={tmp_path}/not/yet/there"])


def test_this_machine_will_do(recipe: Recipe) -> None:
    preflight.check_machine(recipe)


def test_a_full_disk(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 99, 1 if "shm" not in str(path) else 1 << 40))
    with pytest.raises(ValueError, match=r"0\.0 GiB free, 3 are needed: .*runs_dir"):
        preflight.check_machine(recipe)


def test_too_little_memory(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: preflight.GIB)
    with pytest.raises(ValueError, match=r"1\.0 GiB of memory are available, 4 are needed"):
        preflight.check_machine(recipe)


def test_a_small_shared_memory_folder(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64, 0, 64) if str(path) == "/dev/shm" else usage(path))
    with pytest.raises(ValueError, match="--shm-size"):
        preflight.check_machine(recipe)


def test_all_problems_are_told_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 99, 1 if "shm" not in str(path) else 1 << 40))
    monkeypatch.setattr(preflight, "available_memory", lambda: 0)
    with pytest.raises(ValueError) as caught:
        preflight.check_machine(recipe)
    assert len(str(caught.value).splitlines()) == 2


def test_available_memory_is_known_here() -> None:
    available = preflight.available_memory()
    assert available is not None and available > 0
