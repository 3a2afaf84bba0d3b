"""Checkpoints: sharded, resharded on load, atomic, verified.

    <root>/step_00000250/rank_00000.safetensors   pieces of the fp32 state this worker holds
                        /state.json               step, samples, hashes, world size, and every file's size and sha256
                        /_COMPLETE                written last: the sha256 of state.json

A shard holds 1-D fp32 tensors named `kind/parameter` (`master`, `ema`, `exp_avg`, `exp_avg_sq`, `momentum`) and, in its
metadata, the first element of each piece within the flattened parameter. That is all a loader at another world size or
ZeRO stage needs: it reads the ranges that it holds. So there is one format and one code path for a resume at the same and
at another size, for AdamW and Muon alike, without pickles and without a conversion step (docs/training.md compares this
with DeepSpeed's universal checkpoints).
"""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluid_core.training.ema import ShardedEMA
from fluid_core.training.optimizer import FluidOptimizer
from fluid_core.training.partitions import Partitions
from fluid_core.workflow.stage import file_sha256, write_json_atomic

if TYPE_CHECKING:
    from fluid_core.training.remote import Uploader

FORMAT_VERSION = 1
COMPLETE, STATE, PINNED = "_COMPLETE", "state.json", "_PINNED"
_WAIT_SECONDS = 1800.0
SHARED_SECONDS = 30.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. `complete` says that its marker was written; `verify` reads everything."""

    path: Path
    step: int

    @property
    def complete(self) -> bool:
        marker, state = self.path / COMPLETE, self.path / STATE
        return marker.is_file() and state.is_file() and marker.read_text().strip() == file_sha256(state)

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text())

    @property
    def pinned(self) -> bool:
        return (self.path / PINNED).exists()

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in self.path.iterdir() if f.is_file())

    def problem(self) -> str | None:
        """What is wrong with it, or None: marker, every file's size and checksum."""
        if not self.complete:
            return f"{self.path}: not complete (no valid {COMPLETE})"
        for name, expected in self.state["files"].items():
            file = self.path / name
            if not file.is_file():
                return f"{file}: missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{file}: {file.stat().st_size} bytes, expected {expected['bytes']}"
            if file_sha256(file) != expected["sha256"]:
                return f"{file}: wrong checksum"
        return None


def list_checkpoints(root: str | Path) -> list[Checkpoint]:
    """Every checkpoint folder, complete or not, oldest first. Others, such as a copy that someone named step_00000004.bak, are not
    looked at."""
    found = []
    for folder in Path(root).glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and folder.is_dir():
            found.append(Checkpoint(folder, int(number)))
    return sorted(found, key=lambda c: c.step)


def latest_complete(root: str | Path, verify: bool = False, report: Any = None) -> Checkpoint | None:
    """The newest checkpoint that can be trusted. With `verify` its checksums are read; what is passed over is reported."""
    for checkpoint in reversed(list_checkpoints(root)):
        problem = checkpoint.problem() if verify else (None if checkpoint.complete else "not complete")
        if problem is None:
            return checkpoint
        if report:
            report(f"passing over checkpoint {checkpoint.path.name}: {problem}")
    return None


def retained(steps: list[int], keep_last: int, keep_every: int | None) -> set[int]:
    """Which of the steps of complete checkpoints are kept: the last ones, and every `keep_every` steps."""
    return {s for s in steps if keep_every and s % keep_every == 0} | set(sorted(steps)[-keep_last:])


def pin(checkpoint: Checkpoint) -> None:
    """Never delete this one (a promoted model came from it)."""
    (checkpoint.path / PINNED).touch()


class Checkpointer:
    """Saves in the background, one checkpoint at a time; the training thread only copies its shards.

    Workers do not talk to each other here: each writes its shard and a small receipt beside it, and rank 0 waits for all
    receipts, writes `state.json` and the marker, and moves the folder to its name. The folder must be one that all
    workers see (a shared disk). With an `uploader` (rank 0) it is copied to S3 afterwards, and what `keep_every` keeps is
    kept there.
    """

    def __init__(
        self,
        root: str | Path,
        partitions: Partitions,
        optimizer: FluidOptimizer,
        ema: ShardedEMA,
        keep_last: int,
        keep_every: int | None,
        uploader: "Uploader | None" = None,
    ):
        self.root = Path(root)
        self.partitions, self.optimizer, self.ema = partitions, optimizer, ema
        self.keep_last, self.keep_every, self.uploader = keep_last, keep_every, uploader
        self.rank, self.world_size = partitions.rank, partitions.world_size
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.root.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for stale in self.root.glob(".step_*"):
                shutil.rmtree(stale, ignore_errors=True)
            for stale in self.root.glob(".seen_*"):
                stale.unlink()
        self._check_shared()

    def _check_shared(self) -> None:
        """Raises ValueError where a worker does not see what rank 0 writes: its shards would be waited for in vain."""
        name = [f".seen_{uuid.uuid4().hex}"]
        torch.distributed.broadcast_object_list(name, src=0)
        mark = self.root / name[0]
        if self.rank == 0:
            mark.touch()
        torch.distributed.barrier()
        deadline = time.monotonic() + SHARED_SECONDS  # network file systems keep what they know of a folder for a while
        while not mark.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"worker {self.rank} on {socket.gethostname()} does not see what worker 0 writes to {self.root}: set runs_dir or "
                    "training.checkpoint_path to a folder that all machines share"
                )
            time.sleep(0.1)
        torch.distributed.barrier()
        if self.rank == 0:
            mark.unlink()

    def _flats(self) -> dict[str, list[Tensor]]:
        return {**self.partitions.states(), "ema": self.ema.flats}

    def save(self, step: int, state: dict[str, Any], attempt: str) -> None:
        """Start saving. Blocks only while the previous save is unfinished and while shards are copied.

        Args:
            attempt: the same on all workers and different in every start of the run, so that an abandoned save of an
                earlier start cannot mix with this one.
        Raises:
            OSError: when the previous save failed (disk full, ...).
        """
        self.wait()
        pieces: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        if not self.partitions.replicated or self.rank == 0:
            for kind, flats in self._flats().items():
                for s in self.partitions.segments():
                    if flats[s.buffer].numel():
                        flat = flats[s.buffer].detach()[s.offset : s.offset + s.numel]
                        pieces[f"{kind}/{s.name}"] = flat.to("cpu", copy=True)
                        starts[f"{kind}/{s.name}"] = s.start
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": self.world_size,
            "optimizer_steps": self.optimizer.steps,
            "ema_updates": self.ema.updates,
            "shapes": {name: list(shape) for name, shape in self.partitions.shapes.items()},
            **state,
        }
        self._thread = threading.Thread(
            target=self._run, args=(step, pieces, starts, state, attempt), name="fluid-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the save in progress is over."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises OSError when a save that ended meanwhile had failed."""
        if self._error is not None:
            error, self._error = self._error, None
            newest = latest_complete(self.root)
            kept = (
                f"the newest complete checkpoint is of step {newest.step}" if newest else "there is no complete checkpoint yet"
            )
            raise OSError(f"a checkpoint could not be written to {self.root}: {error}; {kept}") from error

    def _run(self, step: int, pieces: dict[str, Tensor], starts: dict[str, int], state: dict[str, Any], attempt: str) -> None:
        started = time.monotonic()
        try:
            folder = self.root / f".step_{step:08d}.{attempt}"
            folder.mkdir(parents=True, exist_ok=True)
            name = f"rank_{self.rank:05d}.safetensors"
            save_file(pieces, folder / name, metadata={"starts": json.dumps(starts)})
            _fsync(folder / name)
            receipt = {"name": name, "bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
            write_json_atomic(folder / f"{name}.receipt", receipt)
            if self.rank == 0:
                self._finish(folder, step, state)
        except BaseException as error:  # a failed save is raised by the next call on the training thread
            self._error = error
        self.seconds = time.monotonic() - started

    def _finish(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        receipts = [folder / f"rank_{rank:05d}.safetensors.receipt" for rank in range(self.world_size)]
        deadline = time.monotonic() + _WAIT_SECONDS
        while not all(r.exists() for r in receipts):
            if time.monotonic() > deadline:
                raise OSError(f"checkpoint of step {step}: not every worker wrote its shard within {_WAIT_SECONDS:.0f} s")
            time.sleep(0.02)
        parts = [json.loads(r.read_text()) for r in receipts]
        state["files"] = {part["name"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
        write_json_atomic(folder / STATE, state)
        for receipt in receipts:
            receipt.unlink()
        marker = folder / COMPLETE
        marker.write_text(file_sha256(folder / STATE) + "\n")
        _fsync(marker)
        _fsync(folder)
        final, replaced = self.root / f"step_{step:08d}", self.root / f".step_{step:08d}.replaced"
        if final.exists():  # an earlier start came this far: that one was passed over as damaged, or rolled back behind
            if Checkpoint(final, step).pinned:
                (folder / PINNED).touch()
            os.replace(final, replaced)
        os.replace(folder, final)
        _fsync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        self._retain()
        if self.uploader:
            self.uploader.notify()

    def _retain(self) -> None:
        complete = [c for c in list_checkpoints(self.root) if c.complete]
        keep = retained([c.step for c in complete], self.keep_last, self.keep_every)
        for checkpoint in complete[: -self.keep_last]:
            copied = self.uploader is not None and self.uploader.has(checkpoint)
            if not checkpoint.pinned and (checkpoint.step not in keep or copied):
                _remove(checkpoint.path)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Put a checkpoint's weights, EMA and optimizer state into this worker's partitions; returns its `state.json`.

        Raises:
            ValueError: parameters or optimizer state that do not fit this model, naming the first difference.
        """
        state = checkpoint.state
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{checkpoint.path}: format {state['format_version']}, this Fluid reads {FORMAT_VERSION}")
        saved = {name: tuple(shape) for name, shape in state["shapes"].items()}
        for name in sorted(saved.keys() | self.partitions.shapes.keys()):
            if saved.get(name) != self.partitions.shapes.get(name):
                raise ValueError(
                    f"{checkpoint.path} does not fit the recipe's model: {name} is {saved.get(name)} in the checkpoint, "
                    f"{self.partitions.shapes.get(name)} in the model. Use the recipe that the run was started with"
                )
        with ShardReader(checkpoint.path, list(state["files"])) as reader, torch.no_grad():
            for kind, flats in self._flats().items():
                for s in self.partitions.segments():
                    if flats[s.buffer].numel():
                        values = reader.read(kind, s.name, s.start, s.numel)
                        flats[s.buffer][s.offset : s.offset + s.numel].copy_(values)
        self.optimizer.steps = state["optimizer_steps"]
        self.ema.updates = state["ema_updates"]
        self.partitions.write_back()
        torch.distributed.barrier()
        return state


class ShardReader:
    """Any range of any parameter out of a checkpoint's shards, whatever the world size that wrote them."""

    def __init__(self, folder: Path, files: list[str]):
        self.folder = folder
        self._files = [safe_open(folder / name, framework="pt") for name in files]
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for file in self._files:
            starts = json.loads((file.metadata() or {}).get("starts", "{}"))
            for key, start in starts.items():
                numel = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault(key, []).append((start, numel, file))

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.clear()
        self._pieces.clear()

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32."""
        key = f"{kind}/{name}"
        if key not in self._pieces:
            raise ValueError(f"{self.folder} holds no {kind} of {name}: was it trained with another optimizer?")
        out = torch.empty(numel)
        filled = 0
        for first, count, file in self._pieces[key]:
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                out[low - start : high - start] = file.get_slice(key)[low - first : high - first]
                filled += high - low
        if filled != numel:
            raise ValueError(f"{self.folder}: {key} has {filled} of {numel} elements; a shard is missing")
        return out


def load_ema_state(checkpoint: str | Path, kind: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 parameter) of a checkpoint's averaged weights, one parameter in memory at a time."""
    folder = Path(checkpoint)
    state = Checkpoint(folder, 0).state
    with ShardReader(folder, list(state["files"])) as reader:
        for name, shape in state["shapes"].items():
            numel = 1
            for n in shape:
                numel *= n
            yield name, reader.read(kind, name, 0, numel).view(*shape)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """The marker goes first, so that a removal cut short leaves no checkpoint that looks complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
