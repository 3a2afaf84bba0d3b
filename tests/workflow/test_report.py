"""The report is told from whatever the stages left, and its charts follow the page's colours."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluid_core.config import Recipe, load_recipe
from fluid_core.config.training import MixtureItem
from fluid_core.workflow.charts import line_chart, smooth
from fluid_core.workflow.report import build_report
from fluid_core.workflow.runner import STAGES
from fluid_core.workflow.stage import Stage, write_json_atomic


@pytest.fixture
def recipe(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(repository / "configs" / "tiny.yaml")
    recipe.run_dir.mkdir(parents=True)
    return recipe


def report(recipe: Recipe) -> str:
    (path,) = build_report(recipe, STAGES, dict.fromkeys(STAGES, 61.0))
    return path.read_text()


def test_charts_are_valid_svg_in_the_pages_colours() -> None:
    steps = list(range(100))
    svg = line_chart({"loss": (steps, [1.0 / (s + 1) for s in steps]), "<b>": ([0, 50], [1.0, 0.1])}, "step", "loss", log=True)
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib and "width" not in root.attrib
    assert "currentColor" in svg and "#010203" not in svg and "<b>" not in svg
    assert svg == line_chart(
        {"loss": (steps, [1.0 / (s + 1) for s in steps]), "<b>": ([0, 50], [1.0, 0.1])}, "step", "loss", log=True
    )


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert smooth([2.0, 4.0], 1) == [2.0, 4.0]


def test_a_run_that_left_little_is_told_in_little(recipe: Recipe) -> None:
    page = report(recipe)
    assert "<h2>Stages</h2>" in page and "9 min 9 s" in page
    assert "<h2>Training</h2>" not in page and "<h2>Scores" not in page


def test_what_was_written_is_shown_and_escaped(recipe: Recipe) -> None:
    folder = recipe.run_dir / "evaluation"
    (folder / "samples").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / "samples" / "a.png")
    tiles = [{"file": "samples/a.png", "caption": "<script>alert(1)</script>", "right": False}]
    write_json_atomic(folder / "samples.json", [{"title": "Shapes & more", "tiles": tiles}])
    row = {"metric": "shapes/seen", "value": 0.96, "samples": 256, "interval": [0.93, 0.98]}
    write_json_atomic(folder / "metrics.json", {"metrics": {"shapes/seen": 0.96}, "table": [row]})
    recipe.registry.minimum_metrics = {"shapes/seen": 0.95}
    Stage(recipe, "evaluate", []).finish([folder], metrics={"shapes/seen": 0.96}, bundle="bundles/x")
    lines = [{"step": step, "loss": 1.0 / step, "grad_norm": 1.0} for step in range(1, 200)]
    (recipe.training_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 200, "lo')
    page = report(recipe)
    assert "<script>" not in page and "&lt;script&gt;" in page and "Shapes &amp; more" in page
    assert 'class="wrong"' in page and "at least 0.95" in page and "0.93 to 0.98" in page and "0.96" in page
    assert page.count("<svg") == 2 and "Joins later" not in page


def test_training_shows_the_averaged_weights_pictures_and_what_joined_later(recipe: Recipe) -> None:
    (recipe.training_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    samples = recipe.training_dir / "samples"
    samples.mkdir()
    for name in ("ema_00000004", "raw_00000004", "ema_00000012", "raw_00000012"):
        Image.new("RGB", (8, 8)).save(samples / f"{name}.png")
    recipe.training.datasets = [
        MixtureItem(path=recipe.encode.output, source="*shapes*"),
        MixtureItem(path=recipe.encode.output, source="*openmoji*", from_step=7),
    ]
    page = report(recipe)
    assert page.count("samples at step") == 4 and "samples at step 4<" in page and "samples at step 12<" in page
    assert "the training loss jumps: *openmoji* from step 7." in page
