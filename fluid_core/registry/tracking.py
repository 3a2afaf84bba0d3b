"""Experiment tracking that training can trust: it never blocks, never raises, never loses what it was told.

    with Tracker(uri, experiment, run_name) as tracker:
        tracker.log_metrics({"loss": 0.3}, step=10)

Calls put events on a queue; a background thread sends them to MLflow. While MLflow cannot be reached the events go to a
spool folder, and are sent when it is back: by this tracker, or by the next one that is given the same `spool_dir`.
"""

import fcntl
import json
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fluid_core.registry.mlflow_client import absolute_uri, artifact_root, experiment_id, mlflow_client

logger = logging.getLogger(__name__)

PARENT_RUN_ENV = "FLUID_PARENT_RUN_ID"
SPOOL = "tracking-spool"
RUN_TAG = "fluid.run"
Event = dict[str, Any]
_STOP: Event = {"kind": "stop"}
_ATTEMPTS = 3


class _Run:
    """An MLflow run and the way of one event into it. Everything here may raise.

    The run is the one that carries the header's RUN_TAG: made by an earlier tracker, on this side of a kill or on the other, or
    else by this one.
    """

    def __init__(self, header: dict[str, Any]):
        from mlflow.entities import RunTag

        self.client = mlflow_client(header["uri"])
        self.run_id: str = header["run_id"] or ""
        if not self.run_id:
            experiment, tags = experiment_id(self.client, header["experiment"]), header["tags"]
            self.run_id = self._find(experiment, tags)
            if self.run_id:
                self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            else:
                run = self.client.create_run(
                    experiment, run_name=header["run_name"], tags=tags, start_time=header["start_time"]
                )
                self.run_id = run.info.run_id
            header["run_id"] = self.run_id
        if not header.get("resumed"):
            self.client.update_run(self.run_id, status="RUNNING")
            header["resumed"] = True

    def _find(self, experiment: str, tags: dict[str, str]) -> str:
        if RUN_TAG not in tags:  # from a spool of an earlier Fluid
            return ""
        # The oldest: had two trackers made one at the same moment, all that come after agree.
        found = self.client.search_runs(
            [experiment], f"tags.`{RUN_TAG}` = '{tags[RUN_TAG]}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        return found[0].info.run_id if found else ""

    def apply(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

        kind, client, run_id = event["kind"], self.client, self.run_id
        if kind == "metrics":
            metrics = [Metric(k, v, event["time"], event["step"]) for k, v in event["values"].items()]
            for first in range(0, len(metrics), 1000):
                client.log_batch(run_id, metrics=metrics[first : first + 1000])
        elif kind == "params":
            known = client.get_run(run_id).data.params
            params = [Param(k, v) for k, v in event["values"].items() if k not in known]
            for first in range(0, len(params), 100):
                client.log_batch(run_id, params=params[first : first + 100])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in event["values"].items()])
        elif kind == "image":
            image = event["image"] if isinstance(event["image"], Image.Image) else Image.open(event["image"])
            client.log_image(run_id, image, key=event["key"], step=event["step"], timestamp=event["time"])
        elif kind == "artifact":
            path = Path(event["path"])
            if path.is_dir():
                client.log_artifacts(run_id, str(path), artifact_path=path.name)
            else:
                client.log_artifact(run_id, str(path))
        elif kind == "dataset":
            source = json.dumps({"uri": event["uri"], "digest": event["digest"]})
            # MLflow keeps 36 characters of a digest; the whole one is in the source.
            data = Dataset(event["name"], event["digest"][:36], source_type="uri", source=source)
            client.log_inputs(run_id, datasets=[DatasetInput(data)])
        elif kind == "end":
            client.set_terminated(run_id, status=event["status"], end_time=event["time"])
        else:
            raise AssertionError(kind)


class Tracker:
    """One MLflow run, written from the background.

    Args:
        uri: `sqlite:///path.db` (artifacts go to `mlartifacts` beside it) or the address of a tracking server.
        parent_run_id: makes this a child run; by default the environment's FLUID_PARENT_RUN_ID.
        run_id: go on with this run instead of starting one.
        key: trackers of one key write into one run, whichever of them reaches MLflow first.
        spool_dir: where events wait while MLflow is away; by default `tracking-spool` beside the SQLite file.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        parent_run_id: str | None = None,
        tags: dict[str, str] | None = None,
        spool_dir: str | Path | None = None,
        run_id: str | None = None,
        key: str | None = None,
        retry_seconds: float = 5.0,
    ):
        own = {RUN_TAG: key or uuid.uuid4().hex}
        parent = parent_run_id or os.environ.get(PARENT_RUN_ENV)
        if parent and parent != run_id:
            own["mlflow.parentRunId"] = parent
        self._header: dict[str, Any] = {
            "uri": absolute_uri(uri),
            "experiment": experiment,
            "run_name": run_name,
            "tags": {str(k): str(v) for k, v in (tags or {}).items()} | own,
            "start_time": _now(),
            "run_id": run_id,
            "resumed": False,
        }
        root = artifact_root(uri)
        self._spool_root = Path(spool_dir or (Path(root).parent if root else Path(tempfile.gettempdir())) / SPOOL)
        self._spool = _Spool(self._spool_root / uuid.uuid4().hex)
        self._retry_seconds = retry_seconds
        self._queue: queue.Queue[Event] = queue.Queue()
        self._run: _Run | None = None
        self._connected = threading.Event()
        self._in_flight: Event | None = None
        self._closed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id; waits for MLflow up to 30 s, and after close() no more, then None (the run is created when it is back)."""
        if self._header["run_id"] is None and not self._closed:
            self._connected.wait(30.0)
        return self._header["run_id"]

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters; nested dicts become dotted keys. A parameter that the run has already keeps its first value."""
        self._put({"kind": "params", "values": {k: str(v)[:6000] for k, v in _flatten(params).items()}})

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        values = {k: float(v) for k, v in metrics.items() if v is not None}
        self._put({"kind": "metrics", "values": values, "step": int(step), "time": _now()})

    def log_image(self, image: Image.Image | np.ndarray, key: str, step: int) -> None:
        """A picture shown along the steps in MLflow's UI. `key` may not hold '#' or '%'."""
        picture = image.copy() if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        self._put({"kind": "image", "image": picture, "key": key, "step": int(step), "time": _now()})

    def log_artifact(self, path: str | Path) -> None:
        """A file or folder; it must stay where it is until the tracker is closed."""
        self._put({"kind": "artifact", "path": str(Path(path).absolute())})

    def log_dataset(self, name: str, digest: str, uri: str) -> None:
        self._put({"kind": "dataset", "name": name, "digest": digest, "uri": uri})

    def set_tags(self, tags: dict[str, Any]) -> None:
        self._put({"kind": "tags", "values": {str(k): str(v) for k, v in tags.items()}})

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout: float = 60.0) -> None:
        """Send what is queued and end the run. What cannot be sent stays in the spool, with a warning."""
        if self._closed:
            return
        self._closed = True
        self._queue.put({"kind": "end", "status": status, "time": _now()})
        self._queue.put(_STOP)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._set_aside()
        if self._spool.count:
            logger.warning("MLflow at %s cannot be reached; what was logged waits in %s", self._header["uri"], self._spool_root)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("FINISHED" if kind is None else "KILLED" if killed else "FAILED")

    def _put(self, event: Event) -> None:
        if self._closed:
            logger.warning("logged after close, not kept: %s", event["kind"])
            return
        self._queue.put(event)

    def _set_aside(self) -> None:
        """MLflow is too slow: what was not sent goes to the spool. The event in flight may be sent twice, which changes nothing."""
        waiting = [self._in_flight] if self._in_flight else []
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        for event in waiting:
            if event is not _STOP:
                self._spool.append(self._header, event)
        self._queue.put(_STOP)

    # The background thread.

    def _work(self) -> None:
        retry_at, stopping = 0.0, False
        while True:
            if self._run is None and (time.monotonic() >= retry_at or stopping):
                self._connect()
                retry_at = time.monotonic() + self._retry_seconds
            if stopping:
                break
            try:
                event = self._queue.get(timeout=self._retry_seconds if self._run is None else None)
            except queue.Empty:
                continue
            self._in_flight = event
            if event is _STOP:
                stopping = True
                if self._run is not None:
                    break
            elif self._run is None or not self._deliver(self._run, event):
                self._run = None
                self._spool.append(self._header, event)
            self._in_flight = None
        self._spool.release()

    def _connect(self) -> None:
        """Create or find the run, then send what was spooled, this tracker's first and then what others left."""
        try:
            run = _Run(self._header)
        except Exception as error:
            logger.debug("MLflow is not reachable: %s", error)
            return
        if not self._spool.replay(lambda event: self._deliver(run, event)):
            return
        self._run = run
        self._connected.set()
        for left in _Spool.left_behind(self._spool_root):
            try:
                other = _Run(left.header() | {"resumed": True})
                left.replay(lambda event, other=other: self._deliver_left(other, event))  # type: ignore[misc]
            except Exception as error:
                logger.warning("the tracking spool %s could not be sent: %s", left.folder, error)
            finally:
                left.release()

    def _deliver_left(self, other: _Run, event: Event) -> bool:
        """As `_deliver`, except that a run that goes on here has not ended, whatever was so when the event was left."""
        goes_on = other.run_id == self._header["run_id"]
        return (goes_on and event["kind"] == "end") or self._deliver(other, event)

    def _deliver(self, run: _Run, event: Event) -> bool:
        """True when the event is done with: sent, or refused by MLflow for what it says. False: MLflow is away, or takes nothing.

        Metrics are let go only when MLflow calls them invalid. Anything else is, when MLflow answers otherwise: an artifact store
        that is full must not keep metrics back.
        """
        from mlflow.exceptions import MlflowException

        for attempt in range(_ATTEMPTS):
            try:
                run.apply(event)
                return True
            except Exception as error:
                reason = error
                time.sleep(0.1 * 2**attempt)
        if event["kind"] == "metrics":
            if not isinstance(reason, MlflowException) or reason.error_code != "INVALID_PARAMETER_VALUE":
                return False
        else:
            try:
                run.client.get_run(run.run_id)
            except Exception:
                return False
        # Kept, this event would block everything after it.
        self.dropped += 1
        logger.warning("MLflow refused %s: %s", event["kind"], reason)
        return True


class _Spool:
    """A folder with events.jsonl and the pictures it names, locked by the process that writes it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self._lock: Any = None

    @classmethod
    def left_behind(cls, root: Path) -> list["_Spool"]:
        """Spools under `root` whose writers are gone, locked for the caller."""
        found = []
        for path in sorted(root.glob("*/events.jsonl")) if root.is_dir() else []:
            spool = cls(path.parent)
            if spool._acquire():
                spool.count = 1
                found.append(spool)
        return found

    def header(self) -> dict[str, Any]:
        return json.loads((self.folder / "header.json").read_text())

    def append(self, header: dict[str, Any], event: Event) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._acquire()
                (self.folder / "header.json").write_text(json.dumps(header))
            if event["kind"] == "image":
                path = self.folder / f"{uuid.uuid4().hex}.png"
                event["image"].save(path)
                event = event | {"image": str(path.absolute())}
            with open(self.folder / "events.jsonl", "a") as file:
                file.write(json.dumps(event) + "\n")
            self.count += 1
        except OSError as error:
            logger.error("an event for MLflow is lost, the spool %s cannot be written: %s", self.folder, error)

    def replay(self, deliver: Any) -> bool:
        """Send all events in order and remove the folder; False when MLflow went away (what is left stays)."""
        if not self.count:
            return True
        lines = (self.folder / "events.jsonl").read_text().splitlines(keepends=True)
        for index, line in enumerate(lines):
            # A line without its end was cut off by a kill.
            if line.endswith("\n") and not deliver(json.loads(line)):
                temporary = self.folder / "events.tmp"
                temporary.write_text("".join(lines[index:]))
                temporary.replace(self.folder / "events.jsonl")
                return False
        shutil.rmtree(self.folder, ignore_errors=True)
        self.count = 0
        self.release()
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _acquire(self) -> bool:
        lock = open(self.folder / "lock", "w")  # noqa: SIM115 - held until release()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        self._lock = lock
        return True


def _now() -> int:
    return time.time_ns() // 1_000_000


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
