"""The tracker against a real MLflow on SQLite, present and away."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluid_core.registry.mlflow_client import absolute_uri, mlflow_client
from fluid_core.registry.tracking import Tracker


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs/mlflow.db"


def _run_id(tracker: Tracker) -> str:
    """The run's id, however long MLflow takes to start on a busy machine."""
    deadline = time.monotonic() + 300
    while tracker.run_id is None:
        assert time.monotonic() < deadline
    return tracker.run_id


def test_everything_logged_is_in_mlflow(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with Tracker(uri, "unit", "parent") as parent:
        monkeypatch.setenv("FLUID_PARENT_RUN_ID", _run_id(parent))
        with Tracker(uri, "unit", "child", tags={"git": "abc"}) as child:
            run_id = _run_id(child)
            child.log_params({"model": {"width": 8}, "seed": 1})
            child.log_params({"seed": 2})  # a resumed run with another value: the first stays, nothing raises
            for step in range(50):
                child.log_metrics({"loss": 1.0 / (step + 1)}, step)
            child.log_image(np.zeros((8, 8, 3), np.uint8), "samples", 3)
            child.log_artifact(note)
            child.log_dataset("train", "f" * 64, "runs/encoded")
    client = mlflow_client(uri)
    run = client.get_run(run_id)
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
    deadline = time.monotonic() + 120
    while not list(spool.glob("*/*.png")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    blocker.unlink()
    tracker.log_metrics({"loss": 2.0}, 2)
    run_id = _run_id(tracker)
    tracker.close()
    client = mlflow_client(uri)
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == [1.0, 2.0]
    assert len(client.list_artifacts(run_id, "images")) >= 1
    assert not list(spool.iterdir())


def test_the_next_tracker_sends_what_one_left_behind(uri: str, tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("in the way")
    spool = tmp_path / "spool"
    lost = Tracker(uri, "unit", "lost", spool_dir=spool, retry_seconds=0.2)
    lost.log_metrics({"loss": 3.0}, 1)
    lost.close("FAILED", timeout=20)
    lost._thread.join(300)
    assert list(spool.glob("*/events.jsonl"))
    blocker.unlink()
    with Tracker(uri, "unit", "next", spool_dir=spool) as tracker:
        _run_id(tracker)
    client = mlflow_client(uri)
    runs = client.search_runs([client.get_experiment_by_name("unit").experiment_id])
    found = {r.info.run_name: r for r in runs}
    assert found["lost"].data.metrics == {"loss": 3.0} and found["lost"].info.status == "FAILED"
    assert not list(spool.iterdir())


def test_trackers_of_one_key_write_one_run(uri: str, tmp_path: Path) -> None:
    """A driver that MLflow never answered, and the worker that reaches it first: what the driver left lands in the worker's run."""
    blocker = tmp_path / "runs"
    blocker.write_text("in the way")
    spool = tmp_path / "spool"
    driver = Tracker(uri, "unit", "run", parent_run_id="workflow", tags={"a": "1"}, spool_dir=spool, key="k", retry_seconds=0.2)
    driver.log_params({"width": 8})
    driver.close(timeout=300)
    assert driver.run_id is None
    blocker.unlink()
    with Tracker(uri, "unit", "run", spool_dir=spool, key="k") as worker:
        _run_id(worker)
        worker.log_metrics({"loss": 1.0}, 1)
        client = mlflow_client(uri)
        deadline = time.monotonic() + 300
        while not client.get_run(worker.run_id or "").data.params:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get_run(worker.run_id or "").info.status == "RUNNING", "the driver's end is not the run's"
    with Tracker(uri, "unit", "run", spool_dir=spool, key="another"):
        pass
    runs = client.search_runs([client.get_experiment_by_name("unit").experiment_id])
    assert len(runs) == 2
    (run,) = [run for run in runs if run.data.tags["fluid.run"] == "k"]
    assert run.info.run_id == worker.run_id and run.info.status == "FINISHED"
    assert run.data.params == {"width": "8"} and run.data.metrics == {"loss": 1.0}
    assert run.data.tags["a"] == "1" and run.data.tags["mlflow.parentRunId"] == "workflow"


def test_a_refused_event_does_not_block_the_rest(uri: str, tmp_path: Path) -> None:
    with Tracker(uri, "unit", "run") as tracker:
        _run_id(tracker)
        tracker.log_artifact(tmp_path / "absent.txt")
        tracker.log_metrics({"bad#name": 1.0}, 1)
        tracker.log_metrics({"loss": 4.0}, 1)
    assert tracker.dropped == 2
    assert mlflow_client(uri).get_run(tracker.run_id or "").data.metrics == {"loss": 4.0}


def test_metrics_are_kept_while_the_store_takes_none(uri: str, tmp_path: Path) -> None:
    """It answers every question and refuses every metric: they wait, and come in order when it takes them again."""
    spool = tmp_path / "spool"
    tracker = Tracker(uri, "unit", "run", spool_dir=spool, retry_seconds=0.2)
    run_id = _run_id(tracker)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("ALTER TABLE metrics RENAME TO away")
    tracker.log_metrics({"loss": 1.0}, 1)
    deadline = time.monotonic() + 120
    while tracker._run is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker.log_metrics({"loss": 2.0}, 2)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("ALTER TABLE away RENAME TO metrics")
    tracker.close()
    assert tracker.dropped == 0 and not list(spool.iterdir())
    assert [m.value for m in mlflow_client(uri).get_metric_history(run_id, "loss")] == [1.0, 2.0]


def test_what_a_slow_store_did_not_take_by_the_end_is_sent_by_the_next(uri: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    slow = Tracker(uri, "unit", "slow", spool_dir=spool)
    run_id = _run_id(slow)
    database = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    database.execute("BEGIN IMMEDIATE")  # every write waits now
    for step in range(3):
        slow.log_metrics({"loss": float(step)}, step)
    slow.close(timeout=0.5)
    assert len((next(spool.glob("*/events.jsonl"))).read_text().splitlines()) == 4, "three metrics and the end"
    database.execute("ROLLBACK")
    slow._thread.join(120)  # in a process that ends it would not come to this
    with Tracker(uri, "unit", "next", spool_dir=spool) as tracker:
        _run_id(tracker)
    client = mlflow_client(uri)
    assert {(m.step, m.value) for m in client.get_metric_history(run_id, "loss")} == {(0, 0.0), (1, 1.0), (2, 2.0)}
    assert client.get_run(run_id).info.status == "FINISHED" and not list(spool.iterdir())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, threading.Event]]:
    """The address of MLflow's own server, and a switch: while it is off no request is answered."""
    import mlflow.server
    from werkzeug.serving import make_server

    monkeypatch.setenv(mlflow.server.BACKEND_STORE_URI_ENV_VAR, f"sqlite:///{tmp_path}/server.db")
    monkeypatch.setenv(mlflow.server.ARTIFACT_ROOT_ENV_VAR, str(tmp_path / "artifacts"))
    # A server makes its store the default of its whole process: what other tests have is put back afterwards.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", ""))
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setattr(mlflow.server.handlers, "_tracking_store", None)
    monkeypatch.setattr(mlflow.server.handlers, "_model_registry_store", None)
    answers = threading.Event()

    def slow(environ: dict[str, Any], start: Any) -> Any:
        answers.wait()
        return mlflow.server.app(environ, start)

    web = make_server("127.0.0.1", 0, slow, threaded=True)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.port}", answers
    answers.set()
    web.shutdown()


_LOGS_AND_HANGS = """
import sys, time
from fluid_core.registry.tracking import Tracker

tracker = Tracker(sys.argv[1], "unit", "killed", spool_dir=sys.argv[2])
if sys.argv[3] == "connected":
    while tracker.run_id is None: pass
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
for step in range(100):
    tracker.log_metrics({"loss": float(step)}, step)
print(time.monotonic() - start, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("before", ["connected", "never connected"])
def test_a_kill_while_the_server_hangs_loses_nothing(
    server: tuple[str, threading.Event], repository: Path, tmp_path: Path, before: str
) -> None:
    (uri, answers), spool = server, tmp_path / "spool"
    if before == "connected":
        answers.set()
    child = subprocess.Popen(
        [sys.executable, "-c", _LOGS_AND_HANGS, uri, str(spool), before], cwd=repository, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin and child.stdout and child.stdout.readline() == "ready\n"
    answers.clear()
    print(file=child.stdin, flush=True)
    assert float(child.stdout.readline()) < 5, "logging waits for nothing"
    child.kill()
    child.communicate()
    answers.set()
    with Tracker(uri, "unit", "next", spool_dir=spool) as tracker:
        _run_id(tracker)
    client = mlflow_client(uri)
    runs = client.search_runs([client.get_experiment_by_name("unit").experiment_id])
    (killed,) = [run.info.run_id for run in runs if run.info.run_name == "killed"]
    assert {(m.step, m.value) for m in client.get_metric_history(killed, "loss")} == {(step, step) for step in range(100)}
    assert not list(spool.iterdir())


def test_a_disk_that_takes_nothing_does_not_keep_anything_from_mlflow(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Tracker(uri, "unit", "run", spool_dir=tmp_path / "file" / "spool") as tracker:
        run_id = _run_id(tracker)
        for step in (1, 2):
            tracker.log_metrics({"loss": float(step)}, step)
        tracker.log_image(np.zeros((4, 4, 3), np.uint8), "grid", 1)
    client = mlflow_client(uri)
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == [1.0, 2.0]
    assert client.list_artifacts(run_id, "images") and client.get_run(run_id).info.status == "FINISHED"


def test_addresses() -> None:
    assert absolute_uri("sqlite:///runs/x.db") == f"sqlite:///{Path('runs/x.db').absolute()}"
    with pytest.raises(ValueError, match="sqlite:///"):
        absolute_uri("runs/mlflow.db")
