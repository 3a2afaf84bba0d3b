"""Resuming, skipping and forcing, with small pipelines of the real kind: subprocesses that write stage records."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluid_core.config import Recipe, load_recipe
from fluid_core.workflow import runner
from fluid_core.workflow.child import StageFailed
from fluid_core.workflow.runner import STAGES, Workflow, stages_of, where_to_look

PIPELINE = """
import json, os, sys, time
from pathlib import Path
from fluid_core.entry import run_pipeline
from fluid_core.workflow.stage import Stage, stage_digest

NAME = Path(__file__).stem
STAGES = {stages}

def main(recipe, args):
    before = STAGES[: STAGES.index(NAME)]
    stage = Stage(recipe, NAME, [recipe.seed if NAME == "pretrain" else 0], [stage_digest(recipe, name) for name in before])
    if stage.skip(args.force):
        return
    assert os.environ["FLUID_PARENT_RUN_ID"]
    with open(recipe.run_dir / "calls", "a") as calls:
        calls.write(f"{{NAME}} {{'--force' if args.force else ''}}\\n")
    if (recipe.run_dir / f"fail-{{NAME}}").exists():
        raise ValueError("this stage was told to fail")
    while (recipe.run_dir / f"hang-{{NAME}}").exists():
        time.sleep(0.05)
    output = recipe.run_dir / f"{{NAME}}.out"
    output.write_text("result")
    counts = {{"in": 10, "out": 8, "filtered": 1, "quarantined": 1}} if NAME == "encode_dataset" else {{}}
    model = {{"name": "m", "version": "1", "alias": "champion"}}
    stage.finish([output], metrics={{"loss": 0.5, "a/b": 1.0}}, counts=counts, model=model)
    # The same bytes each time it is redone, as a stage may leave them that takes a rounded second.
    record = recipe.run_dir / "stages" / f"{{NAME}}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {{"seconds": 0.5}}))

def arguments(parser):
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--resume", choices=["same"])

run_pipeline(main, __doc__, arguments)
"""


@pytest.fixture
def config(tmp_path: Path, repository: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in a temporary folder, and toy pipelines for it that need no Ray."""
    pipelines = tmp_path / "pipelines"
    pipelines.mkdir()
    for stage in STAGES:
        (pipelines / f"{stage}.py").write_text(PIPELINE.format(stages=STAGES))
    monkeypatch.setattr(runner, "PIPELINES", pipelines)
    monkeypatch.setattr(runner, "_WITHOUT_RAY", STAGES)
    path = tmp_path / "recipe.yaml"
    text = (repository / "configs" / "tiny.yaml").read_text()
    path.write_text(text.replace("runs/", f"{tmp_path}/runs/").replace("runs_dir: runs", f"runs_dir: {tmp_path}/runs"))
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    return str(path)


def recipe_of(config: str, *overrides: str) -> Recipe:
    return load_recipe(config, [*overrides, f"registry.tracking_uri={os.environ['MLFLOW_TRACKING_URI']}"])


def workflow(config: str, *overrides: str, force: str | None = None) -> Workflow:
    given = [*overrides, f"registry.tracking_uri={os.environ['MLFLOW_TRACKING_URI']}"]
    return Workflow(recipe_of(config, *overrides), config, given, force)


def calls(config: str) -> list[str]:
    path = recipe_of(config).run_dir / "calls"
    lines = path.read_text().splitlines() if path.is_file() else []
    path.unlink(missing_ok=True)
    return [line.strip() for line in lines]


PIPELINES_ONLY = [stage for stage in STAGES if stage != "report"]


def test_all_stages_run_once_then_only_what_changed(config: str) -> None:
    first = workflow(config)
    assert not first.complete()
    outcome = first.run()
    assert outcome == dict.fromkeys(STAGES, "done")
    assert calls(config) == PIPELINES_ONLY
    summary = first.summary(outcome)
    assert summary["counts"] == {"in": 10, "out": 8, "filtered": 1, "quarantined": 1}
    assert summary["model"] == {"name": "m", "version": "1", "alias": "champion"}
    assert summary["metrics"]["pretrain/loss"] == 0.5 and summary["metrics"]["a/b"] == 1.0
    assert all(
        stage["status"] == "done" and stage["seconds"] > 0 for name, stage in summary["stages"].items() if name != "report"
    )
    assert (recipe_of(config).run_dir / "report.html").is_file()

    second = workflow(config)
    assert second.complete()
    again = second.summary(dict.fromkeys(STAGES, "skipped"))
    assert again["stages"]["pretrain"] == {"status": "skipped", "seconds": summary["stages"]["pretrain"]["seconds"]}

    # An output that was removed is made again, and a changed recipe redoes what depends on it.
    (recipe_of(config).run_dir / "serve.out").unlink()
    outcome = workflow(config).run()
    assert outcome["serve"] == "done" and outcome["promote"] == "skipped"
    assert calls(config) == ["serve"]
    assert not workflow(config, "seed=5").complete()
    run_dir = recipe_of(config).run_dir
    (run_dir / "fail-pretrain").touch()
    with pytest.raises(StageFailed):
        workflow(config, "seed=5").run()
    (run_dir / "fail-pretrain").unlink()
    calls(config)
    assert not workflow(config, "seed=5").complete(), "what was made under the old recipe was taken for the new one's"
    outcome = workflow(config, "seed=5").run()
    assert outcome["encode_dataset"] == "skipped" and outcome["pretrain"] == "done"
    assert calls(config) == ["pretrain", "evaluate --force", "promote --force", "serve --force"]


def test_a_failed_stage_goes_on_where_it_was_under_one_parent_run(config: str, tracking_uri: str) -> None:
    from fluid_core.registry.mlflow_client import mlflow_client

    run_dir = recipe_of(config).run_dir
    (run_dir / "fail-pretrain").touch()
    with pytest.raises(StageFailed) as caught:
        workflow(config).run()
    assert caught.value.code == 2
    assert calls(config)[-1] == "pretrain"
    client = mlflow_client(tracking_uri)
    parent = json.loads((run_dir / "stages" / "workflow.json").read_text())["parent_run_id"]
    assert client.get_run(parent).info.status == "FAILED"
    (run_dir / "fail-pretrain").unlink()
    # As if that start had been at work for 100 s before it was killed: the stage's time is that of all its starts.
    os.utime(run_dir / "logs" / "pretrain.log", times=(time.time() + 100, time.time() + 100))
    again = workflow(config)
    outcome = again.run()
    assert 100 < again.summary(outcome)["stages"]["pretrain"]["seconds"] < 200
    assert [stage for stage, status in outcome.items() if status == "skipped"] == list(STAGES[:4])
    assert calls(config) == PIPELINES_ONLY[4:]
    run = client.get_run(parent)
    assert run.info.status == "FINISHED" and run.data.metrics["pretrain/loss"] == 0.5
    assert "report.html" in [file.path for file in client.list_artifacts(parent)]


def test_force_runs_again_from_a_stage_even_over_a_failure(config: str) -> None:
    workflow(config).run()
    calls(config)
    run_dir = recipe_of(config).run_dir
    (run_dir / "fail-evaluate").touch()
    with pytest.raises(StageFailed):
        workflow(config, force="pretrain").run()
    assert calls(config) == ["pretrain --force", "evaluate --force"]
    (run_dir / "fail-evaluate").unlink()
    assert not workflow(config).complete()
    # Without --force now: what had begun goes on, what had not is still forced.
    workflow(config).run()
    assert calls(config) == ["evaluate", "promote --force", "serve --force"]
    assert workflow(config).complete()


def test_killed_while_a_stage_works_it_goes_on_there(config: str, tmp_path: Path, repository: Path) -> None:
    run_dir = recipe_of(config).run_dir
    (run_dir / "hang-evaluate").touch()
    program = f"""
import sys
from fluid_core.workflow import runner
from pathlib import Path
runner.PIPELINES, runner._WITHOUT_RAY = Path({str(tmp_path / "pipelines")!r}), runner.STAGES
sys.argv = ["run_workflow.py", "--config", {config!r}, "--set", "registry.tracking_uri={os.environ["MLFLOW_TRACKING_URI"]}"]
exec(open({str(repository / "pipelines" / "run_workflow.py")!r}).read())
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not ((run_dir / "calls").is_file() and "evaluate" in (run_dir / "calls").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run_dir / "hang-evaluate").unlink()
    calls(config)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert calls(config) == ["evaluate", "promote", "serve"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stages"]["pretrain"]["status"] == "skipped" and summary["stages"]["serve"]["status"] == "done"
    assert "report.html" in done.stdout and "mlflow ui" in done.stdout and "pipelines/serve.py" in done.stdout

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert calls(config) == []


def test_stages_follow_the_recipe(config: str) -> None:
    recipe = recipe_of(config)
    assert stages_of(recipe) == list(STAGES)
    recipe.image_tokenizer.train = None
    recipe.data.openmoji = None
    assert "train_tokenizer" not in stages_of(recipe) and "prepare_openmoji" not in stages_of(recipe)
    recipe.data.shapes = None
    assert "evaluate" not in stages_of(recipe)
    with pytest.raises(ValueError, match="no such stage"):
        Workflow(recipe, config, [], force="evaluate")


def test_the_last_lines_name_files_and_commands(config: str) -> None:
    text = where_to_look(recipe_of(config), config)
    for wanted in ("report.html", "samples.png", "summary.json", "mlflow ui", "serve.py --config", "fluid generate"):
        assert wanted in text
