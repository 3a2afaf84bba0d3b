"""The harness of `make bench`: a table, a file, and a room that fails is told without losing the others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_fluid import tiny_config

from benchmarks import gpu, model, run


def test_results_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "benchmarks"
    package.mkdir()
    row = {"name": "step", "ours": 2.0, "reference": 1.0, "ratio": 2.0, "unit": "steps/s", "target": ">= 1.5"}
    (package / "model.py").write_text(f"def rows():\n    return [{row!r}]\n")
    (package / "train.py").write_text("def rows():\n    raise RuntimeError('no luck')\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main(["model", "train", "--output", str(tmp_path / "results")]) == 1
    printed = capsys.readouterr().out
    assert ">= 1.5" in printed and "benchmarks/train.py ended with exit code 1" in printed
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    assert result["rooms"]["model"]["rows"] == [row] and result["rooms"]["train"]["failure"]
    assert result["machine"]["cores"] >= 1 and result["command"] == "python -m benchmarks.run model train"


def test_an_unknown_room_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["modle"])
    assert "one of model, gpu, encode, train, serve" in capsys.readouterr().err


def test_the_gpu_room_runs_on_a_cpu_too() -> None:
    """Training and generation of the GPU benchmark, with the compiler standing aside."""
    device, config = torch.device("cpu"), tiny_config(masked_tokens_per_image=10, max_text_tokens=40, head_precision="bf16")
    with torch.compiler.set_stance("force_eager"):
        rows = gpu.training_rows(config, device, (4,)) + gpu.generation_rows(config, device, 2, 4, 2)
    assert [row["name"].rsplit(", ", 1)[0] for row in rows] == [
        "training step, fluid-tiny, batch 4, eager", "training step, fluid-tiny, batch 4, compiled",
        "generation, fluid-tiny, 2 images, 4 x 2 steps, eager", "generation, fluid-tiny, 2 images, 4 x 2 steps, compiled",
    ]  # fmt: skip
    assert all(row["ours"] > 0 and row["ratio"] is None for row in rows)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        gpu.rows()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_gives_the_same_numbers(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the method is measured against does the same work: the benchmark itself compares losses and tokens."""
    case = replace(model.CASES[0], batch=4, images=2, num_steps=3, head_steps=2, repeats=1)
    real = model._model
    small = replace(case, settings={**case.settings, "width": 64, "heads": 2, "blocks": 2, "head_blocks": 1})
    monkeypatch.setattr(model, "_model", lambda case, precision: real(small, precision))
    rows = [model._training(case, precision), *model._generation(case, precision)]
    assert rows[0]["ratio"] > 0 and [row["name"].split(",")[0] for row in rows[1:]] == [
        "generation", "part of it: text: aligner", "part of it: trunk", "part of it: head", "part of it: the rest",
    ]  # fmt: skip
