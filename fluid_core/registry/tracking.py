"""Experiment tracking that training can trust: it never blocks, never raises, never loses what it was told.

    with Tracker(uri, experiment, run_name) as tracker:
        tracker.log_metrics({"loss": 0.3}, step=10)

A call writes its event to a file in the spool folder, as it writes a line of metrics.jsonl; a background thread sends it to
MLflow and then forgets it. What is not sent when the process ends, or is killed, is sent by the next tracker that is given the
same `spool_dir`. An event may be sent twice, which changes nothing.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
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
        self._run: _Run | None = None
        self._connected, self._news, self._closing = threading.Event(), threading.Event(), threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id; waits for MLflow up to 30 s, and after close() no more, then None (the run is created when it is back)."""
        if self._header["run_id"] is None and not self._closing.is_set():
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
        """Send what waits and end the run. What cannot be sent stays in the spool, with a warning."""
        if self._closing.is_set():
            return
        self._put({"kind": "end", "status": status, "time": _now()})
        self._closing.set()
        self._news.set()
        self._thread.join(timeout)
        if self._spool.waiting():
            logger.warning("MLflow at %s cannot be reached; what was logged waits in %s", self._header["uri"], self._spool_root)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("FINISHED" if kind is None else "KILLED" if killed else "FAILED")

    def _put(self, event: Event) -> None:
        if self._closing.is_set():
            logger.warning("logged after close, not kept: %s", event["kind"])
            return
        self._spool.append(self._header, event)
        self._news.set()

    # The background thread.

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()  # if so, all there will ever be is in the spool
            connected = self._run is not None
            sent = self._connect() and self._send()
            if sent and not connected:
                self._send_left_behind()
            if closing:
                break
            if sent:
                self._news.wait()
                self._news.clear()
            else:
                self._closing.wait(self._retry_seconds)
        self._spool.release()

    def _connect(self) -> bool:
        """Create or find the run."""
        if self._run is None:
            try:
                self._run = _Run(self._header)
            except Exception as error:
                logger.debug("MLflow is not reachable: %s", error)
                return False
            self._connected.set()
        return True

    def _send(self) -> bool:
        """All that waits; False when MLflow went away before the end."""
        assert self._run is not None
        while (event := self._spool.first()) is not None:
            if not self._deliver(self._run, event):
                self._run = None
                return False
            self._spool.drop_first()
        return True

    def _send_left_behind(self) -> None:
        """What trackers left that are gone."""
        for left in _Spool.left_behind(self._spool_root):
            try:
                if left.waiting():
                    other = _Run(left.header() | {"resumed": True})
                    while (event := left.first()) is not None and self._deliver_left(other, event):
                        left.drop_first()
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
    """Events that MLflow has not got yet: a folder with events.jsonl and the pictures it names, locked by the process that uses it.

    The file is emptied whenever all of it was sent, and the folder removed at the end. Only where the disk takes nothing do
    events wait in memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._mutex = threading.Lock()
        self._file: Any = None
        self._lock: Any = None
        self._size, self._sent, self._length = 0, 0, 0
        self._unwritten: deque[Event] = deque()

    @classmethod
    def left_behind(cls, root: Path) -> list["_Spool"]:
        """Spools under `root` whose users are gone, locked for the caller."""
        found = []
        for path in sorted(root.glob("*/events.jsonl")) if root.is_dir() else []:
            spool = cls(path.parent)
            # Its user, alive, may be removing it.
            with contextlib.suppress(OSError):
                if spool._acquire():
                    spool._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - held until release()
                    spool._size = path.stat().st_size
                    found.append(spool)
        return found

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = json.loads((self.folder / "header.json").read_text())
        return header

    def waiting(self) -> bool:
        with self._mutex:
            return self._sent < self._size or bool(self._unwritten)

    def append(self, header: dict[str, Any], event: Event) -> None:
        with self._mutex:
            try:
                self._write(header, event)
            except OSError as error:
                if not self._unwritten:
                    logger.error("%s cannot be written, what is logged waits in memory: %s", self.folder, error)
                self._unwritten.append(event)

    def first(self) -> Event | None:
        """The oldest event."""
        with self._mutex:
            self._length = 0
            if self._sent < self._size:
                with open(self._file.fileno(), "rb", closefd=False) as file:
                    file.seek(self._sent)
                    line = file.readline()
                if line.endswith(b"\n"):
                    self._length = len(line)
                    event: Event = json.loads(line)
                    return event
                self._sent = self._size  # cut off by a kill
            return self._unwritten[0] if self._unwritten else None

    def drop_first(self) -> None:
        """Forget the event that `first` gave."""
        with self._mutex:
            if not self._length:
                self._unwritten.popleft()
                return
            self._sent += self._length
            if self._sent == self._size:
                self._file.truncate(0)
                self._size = self._sent = 0
                for picture in self.folder.glob("*.png"):
                    picture.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of the folder, which is removed when nothing waits in it."""
        if self._lock is None:
            return
        if not self.waiting():
            (self.folder / "events.jsonl").unlink(missing_ok=True)  # first: what a kill leaves is then no spool
            shutil.rmtree(self.folder, ignore_errors=True)
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None

    def _write(self, header: dict[str, Any], event: Event) -> None:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._acquire()
            (self.folder / "header.json").write_text(json.dumps(header))
            self._file = open(self.folder / "events.jsonl", "a+b", buffering=0)  # noqa: SIM115 - held until release()
        if event["kind"] == "image":
            path = self.folder / f"{uuid.uuid4().hex}.png"
            event["image"].save(path, compress_level=1)  # the caller waits
            event = event | {"image": str(path.absolute())}
        data = (json.dumps(event) + "\n").encode()
        written = self._file.write(data)
        if written != len(data):
            self._file.truncate(self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(data)

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
