"""Every command explains itself, and says in one line what is wrong with its input."""

import runpy
import sys
from pathlib import Path

import pytest

from fluid_core import cli

PIPELINES = sorted(path.stem for path in (Path(__file__).parents[1] / "pipelines").glob("*.py"))


def call(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a pipeline that is run in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_explains_itself(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(repository / "pipelines" / f"{name}.py", ["--help"], monkeypatch) == 0
    text = capsys.readouterr().out
    for wanted in ("--config", "--set", "--print-config", f"pipelines/{name}.py"):
        assert wanted in text


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_refuses_bad_recipes_in_one_line(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, config = repository / "pipelines" / f"{name}.py", str(repository / "configs" / "tiny.yaml")
    required = ["--prompts", "prompts.jsonl", "--output", "out"] if name == "generate_batch" else []
    cases = [
        ([config.replace("tiny", "tinny")], "did you mean"),
        ([config, "--set", "training.lerning_rate=1"], "did you mean 'learning_rate'"),
        ([config, "--set", "training.max_steps=no"], "training.max_steps"),
        ([config, "--set", "generation.solver=ddpm"], "'ddpm' does not go with model.objective 'flow': use one of heun, euler"),
        ([config, "--set", "seed"], "write section.key=value"),
        ([config, "--set", "seed=[1"], "is not valid YAML"),
    ]
    for arguments, wanted in cases:
        assert call(script, ["--config", *arguments, *required], monkeypatch) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and wanted in error and "\n" not in error, error


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_looks_at_the_machine_first(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    required = ["--prompts", "prompts.jsonl", "--output", "out"] if name == "generate_batch" else []
    arguments = ["--config", str(repository / "configs" / "tiny.yaml"), "--set", f"runs_dir={tmp_path}", *required]
    for constant, wanted in (("MINIMUM_DISK", "to another disk"), ("MINIMUM_MEMORY", "GiB of memory are available")):
        with monkeypatch.context() as patch:
            patch.setattr(f"fluid_core.workflow.preflight.{constant}", 1 << 60)
            assert call(repository / "pipelines" / f"{name}.py", arguments, monkeypatch) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and wanted in error and "\n" not in error, error


def test_a_job_does_not_write_into_ray_s_copy_of_the_working_directory(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`ray job submit --working-dir .` starts a script in a folder like this one."""
    package, home = tmp_path / "_ray_pkg_0123456789abcdef", tmp_path / "home"
    for folder in (package, home):
        folder.mkdir()
    monkeypatch.chdir(package)
    monkeypatch.delenv("FLUID_HOME", raising=False)
    script = repository / "pipelines" / "prepare_shapes.py"
    arguments = ["--config", str(repository / "configs" / "tiny.yaml")]
    assert call(script, arguments, monkeypatch) == 2
    error = capsys.readouterr().err
    assert "set FLUID_HOME=/FOLDER" in error and not list(package.iterdir())
    monkeypatch.setenv("FLUID_HOME", str(home))
    assert (
        call(script, [*arguments, "--set", "data.shapes.train_scenes=8", "data.shapes.validation_scenes=4"], monkeypatch) == 0
    )
    assert (home / "runs").is_dir() and not list(package.iterdir())


def test_print_config_shows_overrides(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(repository / "configs" / "tiny.yaml"),
        "--set",
        "seed=7",
        "training.max_steps=3",
        "--print-config",
    ]
    assert call(repository / "pipelines" / "pretrain.py", arguments, monkeypatch) == 0
    text = capsys.readouterr().out
    assert "seed: 7" in text and "max_steps: 3" in text


def test_the_workflow_names_its_stages(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(repository / "configs" / "tiny.yaml"), "--force", "pretraining"]
    assert call(repository / "pipelines" / "run_workflow.py", arguments, monkeypatch) == 2
    assert "pretrain" in capsys.readouterr().err


def fluid(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return int(exit_.value.code or 0)


def test_fluid_lists_its_commands_and_each_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert fluid(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in listed
        assert fluid([name, "--help"]) == 0
        assert f"usage: fluid {name}" in capsys.readouterr().out
    assert fluid([]) == 2
    assert fluid(["paint"]) == 2


def test_fluid_says_what_is_missing_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["generate", "a red circle", "--model", str(tmp_path / "nothing")],
        ["inspect", str(tmp_path / "nothing")],
        ["plan", "--config", str(tmp_path / "nothing.yaml"), "--gpus", "8", "--gpu", "h100"],
        ["checkpoints", str(tmp_path / "nothing")],
        ["export", str(tmp_path / "nothing"), str(tmp_path / "out")],
    ):
        assert fluid(arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error, error


def test_every_recipe_loads(repository: Path) -> None:
    from fluid_core.config import load_recipe

    recipes = sorted((repository / "configs").glob("*.yaml"))
    assert len(recipes) >= 5
    for path in recipes:
        assert load_recipe(path).name
