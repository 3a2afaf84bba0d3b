"""The harness of `make bench`: a table, a file, and a room that fails is told without losing the others."""

import json
from pathlib import Path

import pytest

from benchmarks import run


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
    assert "one of model, encode, train, serve" in capsys.readouterr().err
