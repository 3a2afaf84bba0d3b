"""Checkpoints on S3: a copy of the run's local folder, made behind the training's back.

    s3://bucket/prefix/step_00000250/rank_00000.safetensors, state.json, _PINNED     as in the local folder
                                     _COMPLETE                                       written last, deleted first
    s3://bucket/prefix/metrics.jsonl, validation.jsonl     hold every line up to the newest complete checkpoint
                       rollback.json                       the last roll-back (loop.py)

A checkpoint is saved locally first (checkpoint.py), and the training thread knows nothing more about it. A thread of rank 0
compares the local folder with S3 and copies what S3 lacks, newest first. It has no list of its own of what was copied: S3's
markers are the list, so a kill at any point, also between a checkpoint's last file and its marker, is mended by the next
comparison. While S3 does not answer, the checkpoints stay where they are and the comparison is repeated.
"""

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_core.data.storage import CHUNK_BYTES, AccessError, TransientError, open_storage
from fluid_core.training.checkpoint import COMPLETE, PINNED, STATE, Checkpoint, latest_complete, list_checkpoints, retained
from fluid_core.training.metrics import parse_metrics, read_metrics, write_metrics
from fluid_core.workflow.stage import replace_folder, write_json_atomic

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 60.0
FINISH_SECONDS = 1800.0
"""How long the end of a run waits for its last copies."""

HISTORY = ("metrics.jsonl", "validation.jsonl")
ROLLBACK_FILE = "rollback.json"
"""The last roll-back: `step` it went back to, `samples` where training went on, `times` it went back to that step."""
WRITER = "_WRITER"
LEASE_SECONDS, RENEW_SECONDS, SETTLE_SECONDS = 120.0, 20.0, 2.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint's folder on S3: its files' sizes. `complete` says that it has a marker."""

    uri: str
    step: int
    sizes: dict[str, int]

    @property
    def complete(self) -> bool:
        return COMPLETE in self.sizes and STATE in self.sizes

    @property
    def pinned(self) -> bool:
        return PINNED in self.sizes

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


class RemoteCheckpoints:
    """The checkpoints under `uri`, a `s3://` prefix that belongs to one run.

    Raises (every method): AccessError, TransientError, ValueError of data/storage.py.
    """

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")
        self._storage = open_storage(self.uri)

    def list(self) -> list[RemoteCheckpoint]:
        """Every checkpoint, complete or not, oldest first."""
        sizes: dict[int, dict[str, int]] = {}
        for item in self._storage.list("step_"):
            folder, _, name = item.name.partition("/")
            number = folder.removeprefix("step_")
            if number.isdigit() and name:
                sizes.setdefault(int(number), {})[name] = item.size
        return [RemoteCheckpoint(f"{self.uri}/{_folder(step)}", step, sizes[step]) for step in sorted(sizes)]

    def marker(self, step: int) -> str | None:
        """The sha256 of `state.json` that the checkpoint's marker holds; None without a marker."""
        data = self._storage.read_or_none(f"{_folder(step)}/{COMPLETE}")
        return None if data is None else data.decode().strip()

    def state(self, step: int) -> dict[str, Any]:
        """A complete checkpoint's state.json. Raises ValueError when it is not the one its marker was written for."""
        data = self._storage.read_or_none(f"{_folder(step)}/{STATE}") or b""
        if hashlib.sha256(data).hexdigest() != self.marker(step):
            raise ValueError(f"{self.uri}/{_folder(step)}: not complete (no valid {COMPLETE})")
        state: dict[str, Any] = json.loads(data)
        return state

    def problem(self, checkpoint: RemoteCheckpoint) -> str | None:
        """What is wrong with a checkpoint, or None; reads every file."""
        try:
            files = self.state(checkpoint.step)["files"]
        except ValueError as error:
            return str(error)
        for name, expected in files.items():
            if checkpoint.sizes.get(name) != expected["bytes"]:
                return f"{checkpoint.uri}/{name}: {checkpoint.sizes.get(name, 'no')} bytes, expected {expected['bytes']}"
            digest = hashlib.sha256()
            with self._storage.open_input(f"{_folder(checkpoint.step)}/{name}") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != expected["sha256"]:
                return f"{checkpoint.uri}/{name}: wrong checksum"
        return None

    def push(self, checkpoint: Checkpoint) -> None:
        """Copy a complete local checkpoint up, its marker last.

        Raises:
            ValueError: the local files are not what the checkpoint's state says.
            FileNotFoundError: it was deleted meanwhile.
        """
        marker = (checkpoint.path / COMPLETE).read_bytes()
        problem = checkpoint.problem()
        if problem:
            raise ValueError(problem)
        folder = _folder(checkpoint.step)
        # One of an earlier start may be there: from here on it is not complete.
        self._storage.delete(f"{folder}/{COMPLETE}")
        for name in [*checkpoint.state["files"], STATE]:
            self._storage.put_file(checkpoint.path / name, f"{folder}/{name}", overwrite=True)
        if checkpoint.pinned:
            self.pin(checkpoint.step)
        self._storage.put_bytes(marker, f"{folder}/{COMPLETE}", overwrite=True)

    def fetch(self, checkpoint: RemoteCheckpoint, root: Path) -> Checkpoint:
        """Copy a checkpoint down into the folder `root`, where it appears whole or not at all.

        Raises:
            ValueError: what came is not what its state says.
        """
        work, target = root / f".{_folder(checkpoint.step)}.fetch", root / _folder(checkpoint.step)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            # The marker first: when another process replaces the checkpoint under our hands, the files will not fit it.
            for name in sorted(checkpoint.sizes, key=lambda name: name != COMPLETE):
                self._storage.fetch(f"{_folder(checkpoint.step)}/{name}", work).replace(work / name)
            problem = Checkpoint(work, checkpoint.step).problem()
            if problem:
                raise ValueError(problem.replace(str(work), checkpoint.uri))
            replace_folder(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Checkpoint(target, checkpoint.step)

    def push_history(self, run_dir: Path) -> None:
        """Copy the run's lines of metrics and its last roll-back up."""
        for name in (*HISTORY, ROLLBACK_FILE):
            if (run_dir / name).is_file():
                self._storage.put_bytes((run_dir / name).read_bytes(), name, overwrite=True)

    def fetch_history(self, run_dir: Path) -> None:
        """Add to the run's files the lines of steps that they lack; what they hold stays as it is. Of two roll-backs take the later."""
        for name in HISTORY:
            here = read_metrics(run_dir / name)
            known = {line["step"] for line in here}
            there = parse_metrics((self._storage.read_or_none(name) or b"").decode())
            missing = [line for line in there if line["step"] not in known]
            if missing:
                write_metrics(run_dir / name, sorted(here + missing, key=lambda line: line["step"]))
        path, found = run_dir / ROLLBACK_FILE, json.loads(self._storage.read_or_none(ROLLBACK_FILE) or b"null")
        if found and not (path.is_file() and json.loads(path.read_text())["samples"] >= found["samples"]):
            write_json_atomic(path, found)

    def remove_history(self) -> None:
        for name in (*HISTORY, ROLLBACK_FILE):
            self._storage.delete(name)

    def distrust(self, step: int) -> None:
        """Take the marker from a checkpoint that turned out to be damaged; for the holder of the WriterLease alone."""
        self._storage.delete(f"{_folder(step)}/{COMPLETE}")

    def pin(self, step: int) -> None:
        """Never delete this one."""
        self._storage.put_bytes(b"", f"{_folder(step)}/{PINNED}", overwrite=True)

    def remove(self, checkpoint: RemoteCheckpoint) -> None:
        for name in sorted(checkpoint.sizes, key=lambda name: name != COMPLETE):
            self._storage.delete(f"{_folder(checkpoint.step)}/{name}")


class WriterLease:
    """The right to write under a run's prefix, for the duration of a block: one run at a time, on whatever machine it is.

    An object with the holder's name and its last sign of life says who has it. A kill leaves it behind: the next start on
    that machine takes it at once, one on another machine when there was no sign of life for LEASE_SECONDS.
    """

    def __init__(self, uri: str, report: Report):
        self._uri, self._storage, self._report = uri, open_storage(uri), report
        self._name = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="fluid-lease", daemon=True)

    def __enter__(self) -> "WriterLease":
        """Raises ValueError when another run has it."""
        if not self._storage.put_bytes(self._note(), WRITER, overwrite=False):
            holder = self._holder()
            if not _is_gone(holder):
                raise ValueError(self._told(holder))
            self._storage.put_bytes(self._note(), WRITER, overwrite=True)
            time.sleep(SETTLE_SECONDS)  # two may have found it left behind: the later one to write has it
            if not self._is_mine():
                raise ValueError(self._told(self._holder()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        try:
            if self._is_mine():
                self._storage.delete(WRITER)
        except (AccessError, TransientError) as error:
            self._report(f"{self._uri}/{WRITER} could not be removed: {error}")

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                if not self._is_mine():
                    self._report(f"{self._told(self._holder())}; this one was cut off from S3 for too long")
                    return
                self._storage.put_bytes(self._note(), WRITER, overwrite=True)
            except (AccessError, TransientError):
                continue  # the uploader reports it

    def _note(self) -> bytes:
        return json.dumps({**self._name, "alive": time.time()}).encode()

    def _holder(self) -> dict[str, Any]:
        holder: dict[str, Any] = json.loads(self._storage.read_or_none(WRITER) or b"{}")
        return holder

    def _is_mine(self) -> bool:
        return bool(self._holder().get("token") == self._name["token"])

    def _told(self, holder: dict[str, Any]) -> str:
        return (
            f"a run on {holder.get('host')} (process {holder.get('pid')}) writes its checkpoints to {self._uri}: choose another "
            f"training.checkpoint_path, or stop that run; if it was killed, start again in {LEASE_SECONDS:.0f} seconds"
        )


def _is_gone(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname() and not Path(f"/proc/{holder.get('pid')}").exists():
        return True
    return bool(time.time() - holder.get("alive", 0.0) > LEASE_SECONDS)


def fetch_newest(remote: RemoteCheckpoints, root: Path, report: Report, writer: bool = False) -> None:
    """Bring the newest checkpoint of S3 that can be trusted to `root`, unless `root` has that one or a newer one.

    What is passed over is reported. The `writer`, who holds the prefix's lease, also sees to it that it is not taken for complete
    again. A reader changes nothing on S3: a run may be replacing the checkpoint at this moment, and keys may allow reading alone.
    """
    mine = latest_complete(root, verify=True, report=report)
    for checkpoint in reversed(remote.list()):
        if mine is not None and mine.step >= checkpoint.step:
            return
        if not checkpoint.complete:
            report(f"passing over {checkpoint.uri}: not complete")
            continue
        try:
            remote.fetch(checkpoint, root)
        except (ValueError, FileNotFoundError) as error:
            if writer:
                remote.distrust(checkpoint.step)
                report(f"passing over {checkpoint.uri}: {error}")
            else:
                report(f"passing over {checkpoint.uri} for the one before: {error}; if a run is replacing it, try again later")
            continue
        report(f"fetched {checkpoint.uri}")
        return


class Uploader:
    """Keeps S3 like the local folder, in a thread of its own: see the module's text.

    Args:
        root: the local folder; the run's lines of metrics are beside it.
        keep_last, keep_every: what stays on S3; pinned checkpoints always do.
    """

    def __init__(self, root: Path, remote: RemoteCheckpoints, keep_last: int, keep_every: int | None, report: Report = print):
        self._root, self._remote = root, remote
        self._keep_last, self._keep_every = keep_last, keep_every
        self._report = report
        self._on_s3: dict[int, str] = {}
        self._damaged: set[str] = set()
        self._rolled_back = 0
        self._asked, self._done = 0, 0
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="fluid-upload", daemon=True)
        self._thread.start()
        self.notify()  # what an earlier start left behind

    def notify(self) -> None:
        """The local folder has changed."""
        with self._change:
            self._asked += 1
            self._change.notify_all()

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether this checkpoint is known to be complete on S3."""
        return checkpoint.step in self._on_s3

    def finish(self, seconds: float = FINISH_SECONDS) -> bool:
        """Wait until S3 has all that it should have; False when it has not within `seconds`."""
        with self._change:
            asked = self._asked
            return self._change.wait_for(lambda: self._done >= asked, timeout=seconds)

    def _work(self) -> None:
        failures = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._asked > self._done)
                asked = self._asked
            try:
                self._compare()
            except Exception as error:  # whatever it is, training goes on and the copy is tried again
                pause = min(FIRST_PAUSE_SECONDS * 2**failures, LONGEST_PAUSE_SECONDS)
                failures += 1
                self._report(
                    f"checkpoints could not be copied to {self._remote.uri}: {error}; they are safe in {self._root}, "
                    f"next attempt in {pause:.0f} s"
                )
                time.sleep(pause)
                continue
            if failures:
                self._report(f"checkpoints are on {self._remote.uri} again after {failures} failed attempts")
            failures = 0
            with self._change:
                self._done = asked
                self._change.notify_all()

    def _compare(self) -> None:
        rollback = self._root.parent / ROLLBACK_FILE
        changed = rollback.stat().st_mtime_ns if rollback.is_file() else 0
        if changed != self._rolled_back:  # before the next checkpoint: a start elsewhere must skip the same samples
            self._remote.push_history(self._root.parent)
            self._rolled_back = changed
        there = {c.step: c for c in self._remote.list()}
        here = {c.step: c for c in list_checkpoints(self._root) if c.complete}
        keep = self._kept([*there.values(), *here.values()])
        for step, checkpoint in sorted(here.items(), reverse=True):
            if step in keep:
                self._copy(checkpoint, there.get(step))
        there = {c.step: c for c in self._remote.list()}
        keep = self._kept(there.values())
        for step, found in there.items():
            # Parts of a checkpoint that is whole on this side will be completed by a later comparison.
            if step not in keep and (found.complete or step not in here):
                self._remote.remove(found)
                self._on_s3.pop(step, None)

    def _kept(self, checkpoints: Iterable[Checkpoint | RemoteCheckpoint]) -> set[int]:
        complete = [c for c in checkpoints if c.complete]
        pinned = {c.step for c in complete if c.pinned}
        return retained([c.step for c in complete], self._keep_last, self._keep_every) | pinned

    def _copy(self, checkpoint: Checkpoint, found: RemoteCheckpoint | None) -> None:
        try:
            marker = (checkpoint.path / COMPLETE).read_text().strip()
            if marker in self._damaged:
                return
            complete = found is not None and found.complete
            if not complete or (self._on_s3.get(checkpoint.step) or self._remote.marker(checkpoint.step)) != marker:
                self._on_s3.pop(checkpoint.step, None)
                self._remote.push_history(self._root.parent)  # first: no complete checkpoint is without the lines up to it
                self._remote.push(checkpoint)
            elif found is not None and checkpoint.pinned and not found.pinned:
                self._remote.pin(checkpoint.step)
            self._on_s3[checkpoint.step] = marker
        except FileNotFoundError:
            if checkpoint.complete:
                raise
            # Newer ones have taken its place while it was being copied: nothing is lost.
        except ValueError as error:
            if checkpoint.complete and checkpoint.problem() is not None:
                self._damaged.add(marker)
                self._report(f"not copied to {self._remote.uri}: {error}")
            elif checkpoint.complete:
                raise


def places_of_run(run: str) -> tuple[Path | None, str | None]:
    """(local folder, s3:// prefix) of the checkpoints of a run's folder, a folder of checkpoints, or a s3:// prefix.

    A run's folder knows where its checkpoints are from its run.json.
    """
    if "://" in run:
        return None, run
    folder = Path(run)
    record = folder / "run.json"
    noted = json.loads(record.read_text()).get("checkpoints") if record.is_file() else None
    local = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if noted and "://" in noted:
        return local, noted
    return (Path(noted) if noted and Path(noted).is_dir() else local), None


def _folder(step: int) -> str:
    return f"step_{step:08d}"
