"""The training loop of one worker.

    every step:  this worker's micro-batches -> one all-reduce of counts -> forward, backward -> one all-reduce of the loss
                 -> DeepSpeed's step (unless the health policy vetoes it) -> EMA -> metrics.jsonl
    sometimes:   validation, sample grids, a checkpoint; stop when asked to

The loss is the mean over all masked tokens of the global batch: each worker divides its sum by the global count.
"""

import fcntl
import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_core.config import Recipe
from fluid_core.latents.reader import EncodedDataset
from fluid_core.planning import peak_flops, training_flops
from fluid_core.registry.tracking import SPOOL, Tracker
from fluid_core.training.checkpoint import Checkpointer, latest_complete
from fluid_core.training.ema import ShardedEMA
from fluid_core.training.engine import Engine
from fluid_core.training.health import MAX_ROLLBACKS, HealthPolicy, Watchdog
from fluid_core.training.loader import Batch, Collator, Loader, Slicing
from fluid_core.training.metrics import BinnedLoss, MetricsFile
from fluid_core.training.notices import say
from fluid_core.training.preemption import Preemption
from fluid_core.training.ray_data import NAME as RAY_DATASET
from fluid_core.training.ray_data import RayDataLoader
from fluid_core.training.remote import ROLLBACK_FILE, RemoteCheckpoints, Uploader
from fluid_core.training.sampling import Sampler
from fluid_core.training.schedule import learning_rate_factor
from fluid_core.training.validation import Validation
from fluid_core.workflow.stage import write_json_atomic

STOP_FILE = "stop"
_LOCK_SECONDS = 60.0


@dataclass
class RunSettings:
    """What the driver tells its workers besides the recipe. `resume` False: no checkpoint of an earlier start is used."""

    run_dir: str
    fingerprint: str
    tracking_uri: str
    tracking_run_id: str | None = None
    tracking_key: str | None = None
    resume: bool = True


class TrainingLoop:
    """Set-up and steps of one worker; the process group must be there already."""

    def __init__(self, recipe: Recipe, settings: RunSettings):
        self.recipe, self.training, self.settings = recipe, recipe.training, settings
        self.run_dir = Path(settings.run_dir)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _writer_lock(self.run_dir) if self.rank == 0 else None
        self.datasets = [(EncodedDataset(item.path, item.source), item.weight) for item in recipe.mixture]
        self.slicing = Slicing(self.training.batch_size, self.rank, self.world_size, self.training.micro_batch_size)
        self.loader = self._loader()
        self.engine = Engine(recipe.model, self.training, recipe.seed)
        self.null_text = self.loader.collator.null_text_LE.to(self.engine.device)
        self.ema = ShardedEMA(self.engine.partitions, self.training.ema_decay)
        self.health = HealthPolicy(self.training.spike_factor, self.training.max_strikes)
        root, uri = self.training.checkpoint_folder(self.run_dir), self.training.checkpoint_uri
        keep = self.training.keep_last, self.training.keep_every
        self.uploader = Uploader(root, RemoteCheckpoints(uri), *keep, report=self._say) if uri and self.rank == 0 else None
        self.checkpointer = Checkpointer(
            root, self.engine.partitions, self.engine.optimizer, self.ema, *keep, uploader=self.uploader
        )
        attempt = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(attempt, src=0)
        self.attempt = attempt[0]
        self.validation: Validation | None = None
        if recipe.encode.validation_output:
            data = EncodedDataset(recipe.encode.validation_output)
            self.validation = Validation(
                data, self.loader.collator, self.training.validation_samples, self.slicing.micro, self.rank, self.world_size
            )
        self.step, self.position = 0, 0
        self._final: dict[str, float] = {}
        self.loss = float("nan")
        self.bins = BinnedLoss()
        self.tracker: Tracker | None = None
        self.metrics: MetricsFile | None = None
        self.validations: MetricsFile | None = None
        self.sampler: Sampler | None = None
        self.watchdog = Watchdog(self.training.watchdog_seconds, self.run_dir, self.rank)
        self.preemption = Preemption()
        self.engine.optimizer.veto = self._vetoed

    def _loader(self) -> Loader | RayDataLoader:
        encode_ids, window = text_encoder(self.recipe, self.datasets), self.training.shuffle_window
        if self.training.loader == "parquet":
            begins = [item.from_step for item in self.recipe.mixture]
            return Loader(
                self.datasets, self.recipe.model, self.recipe.seed, self.slicing, window, encode_ids, from_steps=begins
            )
        import ray.train

        data = self.datasets[0][0]
        collator = Collator(data.manifest, self.recipe.model, encode_ids)
        shard = ray.train.get_dataset_shard(RAY_DATASET)
        return RayDataLoader(data, shard, self.recipe.seed, self.slicing, window, collator)

    # Start and end.

    def run(self) -> dict[str, Any]:
        """Train to the last step, or until asked to stop.

        Returns:
            {"step", "stopped", "metrics", "uploaded"}; `uploaded` False: S3 lacks checkpoints that the local folder has.
        """
        if self.settings.resume:
            self._resume()
        if self.rank == 0:
            self._open_files()
            self.tracker = Tracker(
                self.settings.tracking_uri,
                self.recipe.registry.experiment,
                self.run_dir.name,
                run_id=self.settings.tracking_run_id,
                key=self.settings.tracking_key,
                spool_dir=self.run_dir.parent / SPOOL,
            )
        if self.training.sample_prompts:
            self.sampler = Sampler(self.recipe, self.engine, self.ema, self.loader.collator)
        status = "FAILED"
        try:
            stopped = self._train()
            status = "KILLED" if stopped else "FINISHED"
        finally:
            self.watchdog.close()
            self._close_files()
            if self.tracker:
                self.tracker.close(status)  # type: ignore[arg-type]
        # The watchdog is closed: nothing but the copy of the last checkpoint is waited for here.
        uploaded = self.uploader is None or self.uploader.finish()
        return {"step": self.step, "stopped": stopped, "metrics": self._final, "uploaded": uploaded}

    def _say(self, text: str) -> None:
        say(self.run_dir, text)

    def _open_files(self) -> None:
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", self.step)
        self.validations = MetricsFile(self.run_dir / "validation.jsonl", self.step)

    def _close_files(self) -> None:
        for file in (self.metrics, self.validations):
            if file:
                file.close()

    def _resume(self) -> None:
        found = self._newest()
        if found is None:
            return
        self._load(found)
        self._saved = True
        # Killed between a roll-back and the next checkpoint: the samples that were skipped stay skipped.
        path = self.run_dir / ROLLBACK_FILE
        rollback = [json.loads(path.read_text()) if self.rank == 0 and path.is_file() else None]
        dist.broadcast_object_list(rollback, src=0)
        if rollback[0] and rollback[0]["step"] == self.step:
            self.position = rollback[0]["samples"]
            self.health.strikes = 0
            self._rolled_back_to, self._rollbacks = self.step, rollback[0]["times"]

    def _newest(self) -> Any:
        """The newest checkpoint to be trusted, or None. Rank 0 reads its checksums and tells the others, so that all load the same."""
        found = [latest_complete(self.checkpointer.root, verify=True, report=self._say) if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _load(self, checkpoint: Any) -> None:
        state = self.checkpointer.load(checkpoint)
        hashes = [data.manifest.hash for data, _ in self.datasets]
        if state["datasets"] != hashes:
            raise ValueError(
                f"{checkpoint.path} was trained on other data (manifest {state['datasets'][0][:12]}, now {hashes[0][:12]}): "
                "an exact resume needs the same data set; give the run a new training.run_name"
            )
        self.step, self.position, self._final = state["step"], state["samples"], state["metrics"]
        self.health.load(state["health"])

    # Steps.

    def _train(self) -> bool:
        stream = self.loader.stream(self.position)
        clock = _Clock()
        stopped = False
        while self.step < self.training.max_steps and not stopped:
            clock.start()
            batches = [batch.to(self.engine.device) for batch in next(stream)]
            clock.lap("data")
            count, stopped, ask, keys = self._agree(batches)
            if stopped:
                break
            if ask and self.preemption.announced() and not self._saved and not self.health.strikes:
                if self.rank == 0:
                    self._say(f"a node is about to be taken away: checkpoint of step {self.step}; training goes on until then")
                self._save()
            rollback = self._step(batches, count, keys, clock)
            if rollback:
                stream.close()
                self._roll_back()
                stream = self.loader.stream(self.position)
                continue
            self._occasionally()
        stream.close()
        if not self._saved:
            self._save()
        self.checkpointer.wait()
        dist.barrier()
        return stopped

    def _agree(self, batches: list[Batch]) -> tuple[int, bool, bool, str]:
        """One all-reduce: masked tokens of the global batch, whether to stop, whether to ask for notices of preemption, and
        the hash of the batch's keys in order."""
        header = torch.zeros(3 + self.training.batch_size, dtype=torch.int64)
        header[0] = sum(batch.draws.count for batch in batches)
        if self.rank == 0:
            header[1] = int((self.run_dir / STOP_FILE).exists())
            header[2] = int(self.preemption.due())
        for batch in batches:
            places = torch.tensor(batch.positions) % self.training.batch_size
            header[3 + places] = batch.key_hashes
        header = header.to(self.engine.device)
        dist.all_reduce(header)
        header = header.cpu()
        keys = hashlib.sha256(header[3:].numpy().tobytes()).hexdigest()
        return int(header[0]), bool(header[1]), bool(header[2]), keys

    def _step(self, batches: list[Batch], count: int, keys: str, clock: "_Clock") -> bool:
        engine = self.engine
        number = self.step + 1
        self.health.enter(self.loader.phase(self.position + self.training.batch_size - 1))
        rate = engine.set_learning_rate(learning_rate_factor(self.training, number))
        logged = number % self.training.log_every == 0 or number == self.training.max_steps
        engine.optimizer.squares = {} if logged else None
        total = torch.zeros((), dtype=torch.float64)
        outputs = []
        for index, batch in enumerate(batches):
            out = engine.forward(batch.tokens, batch.text_BLE, batch.text_mask_BL, self.null_text, batch.draws)
            clock.lap("forward")
            engine.backward(out.loss_sum * (self.world_size / count))
            clock.lap("backward")
            total += out.loss_sum.detach().double().cpu()
            outputs.append((out.per_token, out.timesteps, out.mask_ratio, out.weights))
            if index == len(batches) - 1:
                total = total.to(engine.device)
                dist.all_reduce(total)
                self.loss = float(total) / count
            engine.step()
        norm = engine.gradient_norm
        reason = self.health.reason(self.loss, norm)
        if reason is None:  # a skipped step's NaN would make every mean of the bins NaN
            self.ema.update()
            for output in outputs:
                self.bins.add(*output)
        clock.lap("optimizer")
        rollback = self.health.record(norm, reason)
        self.step, self.position = number, self.position + self.training.batch_size
        self._saved = False
        self.watchdog.beat()
        if reason is not None:
            self._report_strike(batches, reason)
        self._write(keys, norm, rate, reason, clock, logged, batches)
        return rollback

    def _vetoed(self) -> bool:
        return self.health.reason(self.loss, self.engine.gradient_norm) is not None

    def _report_strike(self, batches: list[Batch], reason: str) -> None:
        keys: list[Any] = [None] * self.world_size
        dist.all_gather_object(keys, [key for batch in batches for key in batch.keys])
        if self.rank == 0:
            record = {"step": self.step, "samples": self.position, "reason": reason, "keys": keys}
            with open(self.run_dir / "strikes.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            self._say(f"step {self.step} skipped: {reason}; its samples are in {self.run_dir}/strikes.jsonl")

    def _roll_back(self) -> None:
        """The last good checkpoint's weights, with the samples since then skipped."""
        self.checkpointer.wait()
        dist.barrier()
        found = self._newest()
        if found is None:
            raise ValueError(
                f"{self.training.max_strikes} bad steps in a row before the first checkpoint (see strikes.jsonl): "
                "lower training.learning_rate, lengthen training.warmup_steps, or look at the data"
            )
        self._rollbacks = self._rollbacks + 1 if found.step == self._rolled_back_to else 1
        self._rolled_back_to = found.step
        if self._rollbacks > MAX_ROLLBACKS:
            raise ValueError(
                f"back to step {found.step} {MAX_ROLLBACKS} times, and bad again by step {self.step} (see strikes.jsonl): lower "
                "training.learning_rate, or raise training.spike_factor if such norms are to be expected"
            )
        position = self.position
        self._load(found)
        self.position = position
        self.health.strikes = 0
        if self.rank == 0:
            rollback = {"step": self.step, "samples": self.position, "times": self._rollbacks}
            write_json_atomic(self.run_dir / ROLLBACK_FILE, rollback)
            if self.uploader:
                self.uploader.notify()
            self._close_files()
            self._open_files()
            self._say(f"rolled back to step {self.step}; training goes on with sample {self.position}")

    # What is written.

    def _write(
        self, keys: str, norm: float, rate: float, reason: str | None, clock: "_Clock", logged: bool, batches: list[Batch]
    ) -> None:
        seconds = clock.total
        line: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": norm,
            "samples": self.position,
            "keys_sha256": keys,
            "learning_rate": rate,
            "seconds": round(seconds, 4),
        }
        if reason is not None:
            line["skipped"] = reason
        if logged:
            line |= self._detail(norm, clock, batches)
            if reason is not None:  # vetoed before they were known
                del line["grad_norm_trunk"], line["grad_norm_head"]
        if self.metrics and self.tracker:
            self.metrics.write(line)
            if logged:
                numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
                self.tracker.log_metrics(numbers, step=self.step)

    def _detail(self, norm: float, clock: "_Clock", batches: list[Batch]) -> dict[str, float]:
        """Everything that costs a reduction: only every `log_every` steps."""
        device = self.engine.device
        squares = self.engine.optimizer.squares or {}
        share = 1.0 / self.world_size if self.engine.partitions.replicated else 1.0
        text_tokens = sum(int(batch.text_mask_BL.sum()) for batch in batches)
        sums = torch.tensor(
            [
                float(squares.get("trunk", 0)) * share, float(squares.get("head", 0)) * share,
                float(self.ema.distance_squared()) * share, text_tokens,
            ],
            dtype=torch.float64, device=device,
        )  # fmt: skip
        dist.all_reduce(sums)
        slowest = torch.tensor([*clock.mean().values()], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        table = self.bins.table.to(device)
        dist.all_reduce(table)
        self.bins.table = table.cpu()
        clip = max(1.0, norm / self.training.gradient_clip)
        phases = dict(zip(clock.mean(), slowest.tolist(), strict=True))
        step_seconds = max(sum(phases.values()), 1e-9)
        rate = self.training.batch_size / step_seconds
        # Padding is not computed, so it does not count.
        flops = training_flops(self.recipe.model, float(sums[3]) / self.training.batch_size) * rate
        out = {
            "images_per_second": rate,
            "images_per_second_per_device": rate / self.world_size,
            "tflops_per_device": flops / self.world_size / 1e12,
            "grad_norm_trunk": float(sums[0].sqrt()) * clip,
            "grad_norm_head": float(sums[1].sqrt()) * clip,
            "ema_distance": float(sums[2].sqrt()),
            "data_wait_share": phases["data"] / step_seconds,
            "checkpoint_seconds": self.checkpointer.seconds,
            "memory_gib": _memory_gib(device),
            "epoch": self.loader.epoch(self.position),
            **{f"seconds_{name}": value for name, value in phases.items()},
            **self.bins.read(),
        }
        peak = peak_flops(device)
        if peak:
            out["mfu"] = flops / self.world_size / peak
        clock.reset()
        return out

    def _occasionally(self) -> None:
        training, last = self.training, self.step == self.training.max_steps
        if self.validation and (self.step % training.validate_every == 0 or last):
            self._final = {"validation_loss": self.validation.loss(self.engine, self.null_text)}
            with self.ema.applied():
                self._final["validation_loss_ema"] = self.validation.loss(self.engine, self.null_text)
            if self.tracker and self.validations:
                self.tracker.log_metrics(self._final, step=self.step)
                self.validations.write({"step": self.step, **self._final})
        if self.sampler and (self.step % training.sample_every == 0 or last):
            for name, image in self.sampler.grids():
                if self.tracker:
                    self.tracker.log_image(image, f"samples_{name}", self.step)
                    (self.run_dir / "samples").mkdir(exist_ok=True)
                    image.save(self.run_dir / "samples" / f"{name}_{self.step:08d}.png")
        # Not in the middle of bad steps: a roll-back must find the state before them.
        if (self.step % training.checkpoint_every == 0 and not self.health.strikes) or last:
            self._save()
        self.checkpointer.check()
        self.watchdog.beat()

    _saved = False
    _rollbacks = 0
    _rolled_back_to = -1

    def _save(self) -> None:
        state = {
            "samples": self.position,
            "epoch": self.loader.epoch(self.position),
            "fingerprint": self.settings.fingerprint,
            "datasets": [data.manifest.hash for data, _ in self.datasets],
            "health": self.health.state(),
            "zero_stage": self.training.zero_stage,
            "recipe": self.recipe.model_dump(mode="json"),
            "tracking_key": self.settings.tracking_key,
            "metrics": self._final,
        }
        self.checkpointer.save(self.step, state, self.attempt)
        self._saved = True


class _Clock:
    """Seconds by phase, summed until `reset`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0
        self.total = 0.0
        self._last = time.monotonic()

    def start(self) -> None:
        now = time.monotonic()
        if self._steps:  # what happened between two steps: logging, validation, checkpoints
            self._sums["other"] = self._sums.get("other", 0.0) + now - self._last
        self._steps += 1
        self._last, self.total = now, 0.0

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self._sums[phase] = self._sums.get(phase, 0.0) + now - self._last
        self.total += now - self._last
        self._last = now

    def mean(self) -> dict[str, float]:
        """The phases of a step, without `other`."""
        return {k: self._sums.get(k, 0.0) / max(1, self._steps) for k in ("data", "forward", "backward", "optimizer")}

    def reset(self) -> None:
        self._sums, self._steps = {}, 0


def text_encoder(recipe: Recipe, datasets: list[tuple[EncodedDataset, float]]) -> Any:
    """For data sets of token ids: the frozen text encoder, outside ZeRO's sharding; None for stored embeddings."""
    if all(data.manifest.text_mode == "embeddings" for data, _ in datasets):
        return None
    from fluid_core.encoders.text import TextEncoder
    from fluid_core.training.engine import device

    section = recipe.text_encoder
    encoder = TextEncoder.from_pretrained(
        section.path, revision=section.revision, max_tokens=section.max_tokens, dtype=section.dtype, device=device()
    )
    return encoder.encode_ids


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def _writer_lock(run_dir: Path) -> Any:
    """Only one rank 0 writes into a run's folder; a worker of a killed start may need a moment to go away."""
    file = open(run_dir / ".writer.lock", "w")  # noqa: SIM115 - held as long as the process lives
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{run_dir} is being written by another run: wait for it, or choose another training.run_name"
                ) from None
            time.sleep(0.2)
