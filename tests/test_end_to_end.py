"""The tiniest recipe through everything: Ray Data, Ray Train with ZeRO-3, MLflow, the registry, Ray Serve, the report."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluid_core.cli import main as fluid
from fluid_core.config import Recipe, load_recipe
from fluid_core.latents.reader import EncodedDataset
from fluid_core.registry.mlflow_client import mlflow_client
from fluid_core.workflow.runner import STAGES

# The first test waits for the whole workflow.
pytestmark = pytest.mark.timeout(1500)


def run_here(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a pipeline in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def tiny(repository: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: str) -> tuple[Path, Recipe, str]:
    """configs/tiny.yaml run once in a folder of its own: (its copy there, the recipe, what was printed)."""
    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "tiny.yaml"
    config.write_text((repository / "configs" / "tiny.yaml").read_text())
    command = [sys.executable, str(repository / "pipelines" / "run_workflow.py"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-5000:]
    os.chdir(folder)
    try:
        yield config, load_recipe(config), done.stdout + done.stderr
    finally:
        os.chdir(repository)


@pytest.fixture(scope="module")
def summary(tiny: tuple[Path, Recipe, str]) -> dict[str, Any]:
    return json.loads((tiny[1].run_dir / "summary.json").read_text())


def test_summary_says_what_happened(tiny: tuple[Path, Recipe, str], summary: dict[str, Any]) -> None:
    assert set(summary) == {"stages", "counts", "metrics", "model"}
    assert list(summary["stages"]) == list(STAGES)
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}
    counts = summary["counts"]
    assert counts["in"] == counts["out"] + counts["filtered"] + counts["quarantined"] > 192
    assert summary["model"] == {"name": "fluid-tiny", "version": "1", "alias": "champion"}
    for name in ("shapes/single", "shapes/heldout", "shapes/shuffled", "openmoji/train_top1", "openmoji/heldout_tone"):
        assert 0.0 <= summary["metrics"][name] <= 1.0


def test_no_sample_is_lost_between_the_stages(tiny: tuple[Path, Recipe, str], summary: dict[str, Any]) -> None:
    recipe = tiny[1]
    rows = sum(len(EncodedDataset(root)) for root in (recipe.encode.output, recipe.encode.validation_output) if root)
    assert rows == summary["counts"]["out"]


def test_training_wrote_each_step_once(tiny: tuple[Path, Recipe, str]) -> None:
    lines = [json.loads(line) for line in (tiny[1].training_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, tiny[1].training.max_steps + 1))
    assert lines[-1]["samples"] == tiny[1].training.max_steps * tiny[1].training.batch_size
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_the_registry_serves_the_bundle_that_was_scored(tiny: tuple[Path, Recipe, str], summary: dict[str, Any]) -> None:
    recipe = tiny[1]
    client = mlflow_client(recipe.registry.tracking_uri)
    version = client.get_model_version_by_alias("fluid-tiny", "champion")
    evaluated = json.loads((recipe.run_dir / "stages" / "evaluate.json").read_text())["bundle"]
    assert Path(version.source.removeprefix("file://")).resolve() == Path(evaluated).resolve()
    served = json.loads((recipe.run_dir / "serve" / "images.json").read_text())
    assert [image["prompt"] for image in served] == recipe.training.sample_prompts
    assert {image["model"] for image in served} == {"fluid-tiny:1"}
    for image in served:
        assert Image.open(recipe.run_dir / "serve" / image["file"]).size == (64, 64)


def test_all_runs_are_children_of_one_finished_parent(tiny: tuple[Path, Recipe, str]) -> None:
    recipe = tiny[1]
    client = mlflow_client(recipe.registry.tracking_uri)
    experiment = client.get_experiment_by_name("fluid-tiny")
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
    (workflow,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parents == {None, workflow.info.run_id} and len(runs) >= 5
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_report_is_one_file_that_needs_no_other(tiny: tuple[Path, Recipe, str]) -> None:
    page = (tiny[1].run_dir / "report.html").read_text()
    sources = re.findall(r'(?:src|href|xlink:href)="([^"]{0,30})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "url(http" not in page and "@import" not in page and "<script" not in page
    sections = ["Stages", "What it learns from", "Image tokenizer", "Encoding", "Training", "Scores and samples"]
    sections += ["Answered over HTTP", "Time", "Recipe"]
    assert re.findall("<h2>(.*?)</h2>", page) == sections
    for wanted in ("<svg", "CC BY-SA 4.0", "prefers-color-scheme", "width=device-width"):
        assert wanted in page, wanted
    assert page.count('alt="') == page.count("<img ")
    assert Image.open(tiny[1].run_dir / "samples.png").width > 1000


def test_the_terminal_shows_progress_and_the_logs_the_rest(tiny: tuple[Path, Recipe, str]) -> None:
    _, recipe, printed = tiny
    for wanted in ("[5/9] pretrain", "100%|", "report.html", "mlflow ui --backend-store-uri", "pipelines/serve.py --config"):
        assert wanted in printed
    assert "(raylet)" not in printed and "INFO worker.py" not in printed
    logs = {path.stem for path in (recipe.run_dir / "logs").glob("*.log")}
    assert logs == set(STAGES) - {"report"}


def test_run_again_it_does_nothing_and_force_redoes_one_stage(
    tiny: tuple[Path, Recipe, str], repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, recipe, _ = tiny
    script, arguments = repository / "pipelines" / "run_workflow.py", ["--config", str(config)]
    records = {path: path.read_bytes() for path in (recipe.run_dir / "stages").glob("*.json")}
    assert run_here(script, arguments, monkeypatch) == 0 and "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in records} == records
    summary = json.loads((recipe.run_dir / "summary.json").read_text())
    assert {stage["status"] for stage in summary["stages"].values()} == {"skipped"}

    assert run_here(script, [*arguments, "--force", "report"], monkeypatch) == 0, capsys.readouterr().err
    summary = json.loads((recipe.run_dir / "summary.json").read_text())
    assert [name for name, stage in summary["stages"].items() if stage["status"] == "done"] == ["report"]


def test_fluid_generate_makes_a_picture_with_the_registered_model(
    tiny: tuple[Path, Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tiny[1].registry.tracking_uri)
    with pytest.raises(SystemExit) as end:
        fluid(["generate", "a red circle", "--model", "models:/fluid-tiny@champion", "-o", str(tmp_path / "out")])
    assert not end.value.code
    (picture,) = (tmp_path / "out").glob("*.png")
    assert Image.open(picture).size == (64, 64)
