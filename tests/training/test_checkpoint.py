"""Which checkpoint a start trusts, without training: damage of every kind is passed over in words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from small_run import small_recipe, write_checkpoint

from fluid_core.cli import main
from fluid_core.training.checkpoint import Checkpoint, ShardReader, latest_complete, pin
from fluid_core.training.run import _claim


def _flip_a_bit(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Checkpoint], object]] = {
    "rank_00001.safetensors: missing": lambda c: (c.path / "rank_00001.safetensors").unlink(),
    "bytes, expected": lambda c: (c.path / "rank_00000.safetensors").write_bytes(b"short"),
    "wrong checksum": lambda c: _flip_a_bit(c.path / "rank_00001.safetensors"),
    "not complete": lambda c: (c.path / "_COMPLETE").unlink(),
    "no valid _COMPLETE": lambda c: (c.path / "state.json").write_text("{}"),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_what_is_damaged_is_passed_over_in_words(words: str, tmp_path: Path) -> None:
    good, bad = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    said: list[str] = []
    assert latest_complete(tmp_path, verify=True, report=said.append) == bad and not said
    DAMAGE[words](bad)
    assert latest_complete(tmp_path, verify=True, report=said.append) == good
    assert len(said) == 1 and said[0].startswith("passing over checkpoint step_00000004: ") and words in said[0]


def test_a_shard_that_a_state_does_not_name_is_missed(tmp_path: Path) -> None:
    """Every element must come from somewhere: what no shard holds is not made up."""
    checkpoint = write_checkpoint(tmp_path, 2)
    with ShardReader(checkpoint.path, ["rank_00000.safetensors"]) as reader:
        assert reader.read("master", "w", 990, 10).tolist() == [2.0] * 10
        with pytest.raises(ValueError, match=r"step_00000002: master/w has 10 of 15 elements; a shard is missing"):
            reader.read("master", "w", 990, 15)


def test_copies_beside_the_checkpoints_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a start, `fluid export` and `fluid checkpoints` find, whatever else lies in the folder."""
    root = tmp_path / "checkpoints"
    good = write_checkpoint(root, 2)
    for name in ("step_00000004.bak", "step_old", "step_"):
        shutil.copytree(good.path, root / name)
    (root / "step_6").touch()
    assert latest_complete(root, verify=True) == good
    with pytest.raises(SystemExit) as end:
        main(["checkpoints", str(tmp_path), "--json"])
    assert end.value.code == 0 and [row["step"] for row in json.loads(capsys.readouterr().out)] == [2]


def test_to_begin_again_does_not_delete_what_is_pinned(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    root = recipe.training_dir / "checkpoints"
    write_checkpoint(root, 2)
    pin(write_checkpoint(root, 4))
    with pytest.raises(ValueError, match=r"pinned checkpoints \(step 4\).*training.run_name"):
        _claim(recipe, recipe.training_dir, root, None, "f", resume=None, fresh=True)
    assert latest_complete(root, verify=True) == Checkpoint(root / "step_00000004", 4)


def test_a_used_name_needs_a_word(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    run_dir, root = recipe.training_dir, recipe.training_dir / "checkpoints"

    def start(fingerprint: str, resume: Literal["same", "any"] | None = None) -> dict[str, Any]:
        return _claim(recipe, run_dir, root, None, fingerprint, resume, fresh=False)

    def step(number: int, tracking_key: str) -> None:
        write_checkpoint(root, number, fingerprint="f", tracking_key=tracking_key)

    begun = start("f")
    (root / "step_00000002").mkdir(parents=True)  # killed in the middle of its first checkpoint
    with pytest.raises(ValueError, match=r"another recipe or other data \(no complete checkpoint\): add --resume"):
        start("g", "same")
    assert start("f") == begun, "nothing is lost by beginning again"
    step(4, begun["tracking_key"])
    with pytest.raises(ValueError, match=r"holds this very run \(step 4\): add --resume .* new training.run_name, or --force"):
        start("f")
    for resume in (None, "same"):
        with pytest.raises(ValueError, match=r"holds a run of another recipe or other data \(step 4\): add --resume"):
            start("g", resume)  # type: ignore[arg-type]
    assert start("f", "same") == start("f", "any") == begun
    assert start("g", "any") == begun | {"fingerprint": "g"}
    # Another machine, to which only the checkpoints came: the newest one knows the recipe and the run in MLflow.
    (run_dir / "run.json").unlink()
    with pytest.raises(ValueError, match="holds this very run"):
        start("f")
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        start("g", "same")
    assert start("f", "same") == begun
