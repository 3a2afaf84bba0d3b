"""The tracker against a real MLflow on SQLite, present and away."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from fluid_core.registry.mlflow_client import absolute_uri, mlflow_client
from fluid_core.registry.tracking import Tracker


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_everything_logged_is_in_mlflow(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with Tracker(uri, "unit", "parent") as parent:
        monkeypatch.setenv("FLUID_PARENT_RUN_ID", parent.run_id or "")
        with Tracker(uri, "unit", "child", tags={"git": "abc"}) as child:
            child.log_params({"model": {"width": 8}, "seed": 1})
            child.log_params({"seed": 2})  # a resumed run with another value: the first stays, nothing raises
            for step in range(50):
                child.log_metrics({"loss": 1.0 / (step + 1)}, step)
            child.log_image(np.zeros((8, 8, 3), np.uint8), "samples", 3)
            child.log_artifact(note)
            child.log_dataset("train", "f" * 64, "runs/encoded")
    client = mlflow_client(uri)
    run = client.get_run(child.run_id or "")
    assert run.info.status == "FINISHED" and run.data.tags["git"] == "abc"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.params == {"model.width": "8", "seed": "1"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(s, 1.0 / (s + 1)) for s in range(50)]
    names = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"note.txt", "images"} <= names
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source)["digest"] == "f" * 64
    assert Path(run.info.artifact_uri).is_relative_to(tmp_path / "runs" / "mlartifacts")
    assert "alembic" not in "".join(capfd.readouterr())


def test_mlflow_away_then_back(uri: str, tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("a file where the database's folder should be")
    spool = tmp_path / "spool"
    tracker = Tracker(uri, "unit", "run", spool_dir=spool, retry_seconds=0.2)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_image(np.full((4, 4, 3), 7, np.uint8), "grid", 1)
    while not list(spool.glob("*/*.png")):
        time.sleep(0.05)
    blocker.unlink()
    tracker.log_metrics({"loss": 2.0}, 2)
    run_id = tracker.run_id
    tracker.close()
    client = mlflow_client(uri)
    assert [m.value for m in client.get_metric_history(run_id or "", "loss")] == [1.0, 2.0]
    assert len(client.list_artifacts(run_id or "", "images")) >= 1
    assert not list(spool.iterdir())


def test_the_next_tracker_sends_what_one_left_behind(uri: str, tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("in the way")
    spool = tmp_path / "spool"
    lost = Tracker(uri, "unit", "lost", spool_dir=spool, retry_seconds=0.2)
    lost.log_metrics({"loss": 3.0}, 1)
    lost.close("FAILED", timeout=20)
    assert list(spool.glob("*/events.jsonl"))
    blocker.unlink()
    with Tracker(uri, "unit", "next", spool_dir=spool) as tracker:
        assert tracker.run_id
    client = mlflow_client(uri)
    runs = client.search_runs([client.get_experiment_by_name("unit").experiment_id])
    found = {r.info.run_name: r for r in runs}
    assert found["lost"].data.metrics == {"loss": 3.0} and found["lost"].info.status == "FAILED"
    assert not list(spool.iterdir())


def test_a_refused_event_does_not_block_the_rest(uri: str, tmp_path: Path) -> None:
    with Tracker(uri, "unit", "run") as tracker:
        tracker.log_artifact(tmp_path / "absent.txt")
        tracker.log_metrics({"bad#name": 1.0}, 1)
        tracker.log_metrics({"loss": 4.0}, 1)
    assert tracker.dropped == 2
    assert mlflow_client(uri).get_run(tracker.run_id or "").data.metrics == {"loss": 4.0}


def test_addresses() -> None:
    assert absolute_uri("sqlite:///runs/x.db") == f"sqlite:///{Path('runs/x.db').absolute()}"
    with pytest.raises(ValueError, match="sqlite:///"):
        absolute_uri("runs/mlflow.db")
