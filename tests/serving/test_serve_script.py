"""pipelines/serve.py: what can be wrong is one clear line, and nothing is started for it."""

import argparse
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
from serving_support import Server, small_recipe

from fluid_core.config import Recipe
from fluid_core.serving.app import check, free_port


def serve(repository: Path, recipe: Recipe, *arguments: str) -> Any:
    pipeline = runpy.run_path(str(repository / "pipelines/serve.py"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--force", action="store_true")
    pipeline["add_arguments"](parser)
    return pipeline["main"](recipe, parser.parse_args(arguments))


def test_new_key_is_printed_once(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(tmp_path, api_keys_file=str(tmp_path / "keys"))
    serve(repository, recipe, "--new-key", "ann")
    assert capsys.readouterr().out.startswith("sk-fluid-")
    with pytest.raises(ValueError, match="api_keys_file first"):
        serve(repository, small_recipe(tmp_path), "--new-key", "ann")
    with pytest.raises(ValueError, match="belongs to --check"):
        serve(repository, recipe, "--prompts", "x")


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="another --port"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0


def test_a_cluster_that_serves_already_is_left_alone(server: Server) -> None:
    with pytest.raises(ValueError, match="runs in this Ray cluster already"):
        check(server.recipe)


def test_no_model_is_told_with_the_command_that_makes_one(
    ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def absent(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr(ray, "get_actor", absent)
    with pytest.raises(ValueError, match=r"run pipelines/promote\.py"):
        check(small_recipe(tmp_path))
    with pytest.raises(ValueError, match="not a model bundle"):
        check(small_recipe(tmp_path, model=str(tmp_path)))
    with pytest.raises(ValueError, match="--new-key"):
        check(small_recipe(tmp_path, api_keys_file=str(tmp_path / "absent")))
