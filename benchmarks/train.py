"""Training: DeepSpeed's engine beside a plain torch loop, two workers, the loader beside the trainer's need, checkpoints.

    python -m benchmarks.run train          all of it, with the other rooms' table and JSON
    python -m benchmarks.train muon         one part: adamw, muon, workers, loader, checkpoint, gpu

The model is fluid-tiny (8M parameters, 16 tokens, flow head), in bf16 where the CPU computes it. Steps of both sides alternate
in one process with one thread, and their CPU time is taken, so that other work on the machine does not decide; medians. With a
GPU at hand `gpu` measures the large presets (benchmarks/train_gpu.py).
"""

import json
import multiprocessing
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BATCH = 64
STEPS = 8
WARM_UP = 2
CHECKPOINT_EVERY = 250
"""Steps between the demo's checkpoints, for the share of time that saving takes."""


def rows() -> list[dict[str, Any]]:
    """name, ours, reference, ratio, unit, target; rates in images per second."""
    return [row for part in PARTS.values() for row in part()]


def step_rows(optimizer: str) -> list[dict[str, Any]]:
    (one,) = _spawn(1, partial(_alternate, optimizer))
    name = f"ZeRO-3 step, {optimizer}, 1 worker / plain torch loop"
    return [_row(name, BATCH / one["ours"], BATCH / one["plain"], "images/s", ">= 0.8")]


def worker_rows() -> list[dict[str, Any]]:
    (one,) = _spawn(1, _steps_only)
    two = _spawn(2, _steps_only)

    def row(clock: str, target: str) -> dict[str, Any]:
        rate = 2 * BATCH / max(r[clock] for r in two)
        return _row(f"ZeRO-3 Muon, 2 workers / 1 worker, {clock} time", rate, BATCH / one[clock], "images/s", target)

    return [row("CPU", ">= 1.7"), row("wall", "")]  # wall time has a core for each worker only where nothing else runs


def loader_rows() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        _write_dataset(Path(folder))
        (one,) = _spawn(1, partial(_train_from_files, folder))
    waiting = {"name": "data wait / step", "ours": one["wait"], "reference": one["step"], "unit": "s", "target": "< 0.01"}
    return [
        _row("loader / trainer's need, images per CPU second", one["loader"], one["trainer"], "images/s", ">= 10"),
        {**waiting, "ratio": round(one["wait"] / one["step"], 4)},
    ]


def checkpoint_rows() -> list[dict[str, Any]]:
    (one,) = _spawn(1, _checkpoint_stall)
    share = one["stall"] / (CHECKPOINT_EVERY * one["step"])
    return [
        _row("checkpoint: training stands still / step", one["stall"], one["step"], "s", "<= 1"),
        {
            "name": f"checkpoint stall, share of the time, one in {CHECKPOINT_EVERY} steps",
            "ours": round(one["stall"], 4), "reference": round(CHECKPOINT_EVERY * one["step"], 2), "ratio": round(share, 5),
            "unit": "s", "target": "< 0.01",
        },
    ]  # fmt: skip


def gpu_rows() -> list[dict[str, Any]]:
    """MFU and memory of the large presets, each in a process of its own. Nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    out = []
    ways = [["--zero-stage", "1", "--compile", "--accumulation", "4"], [], ["--checkpointing"]]
    runs = [[preset, *way] for preset in ("fluid-369m", "fluid-1.1b", "fluid-3.1b") for way in ways]
    for arguments in [*runs, ["fluid-10.5b", "--bf16-states", "--checkpointing", "--micro-batch", "32", "--steps", "3"]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        done = subprocess.run(
            [*command, "-m", "benchmarks.train_gpu", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        name = " ".join(arguments)
        if done.returncode:
            out.append({"name": f"{name}: exit status {done.returncode}", "target": "runs"})
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        out.append(_row(f"{name}: model TFLOP/s / peak", found["tflops"], found["peak_tflops"], "TFLOP/s", ">= 0.5 from 1.1b"))
        if found["planned_gib"]:
            out.append(_row(f"{name}: memory / plan", found["memory_gib"], found["planned_gib"], "GiB", "0.9-1.1"))
    return out


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "adamw": partial(step_rows, "adamw"),
    "muon": partial(step_rows, "muon"),
    "workers": worker_rows,
    "loader": loader_rows,
    "checkpoint": checkpoint_rows,
    "gpu": gpu_rows,
}


def _row(name: str, ours: float, reference: float, unit: str, target: str) -> dict[str, Any]:
    return {
        "name": name, "ours": round(ours, 3), "reference": round(reference, 3), "ratio": round(ours / reference, 3),
        "unit": unit, "target": target,
    }  # fmt: skip


# Processes.


def _spawn(workers: int, work: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """`work()` in each of `workers` processes of one gloo group. RuntimeError when one of them fails or dies."""
    from fluid_core.entry import keep_freed_memory

    os.environ.update(keep_freed_memory())  # as training workers on CPU have it; both sides of each ratio
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=_process, args=(rank, workers, port, work, results)) for rank in range(workers)]
    for process in processes:
        process.start()
    found: list[dict[str, float]] = []
    while len(found) < workers:
        try:
            found.append(results.get(timeout=5))
        except queue.Empty:
            dead = [process.exitcode for process in processes if process.exitcode]
            if dead:
                raise RuntimeError(f"a worker ended with exit code {dead[0]}; its output is above") from None
    for process in processes:
        process.join()
    return found


def _process(rank: int, workers: int, port: int, work: Callable[[], dict[str, float]], results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_SIZE=str(workers), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import deepspeed
    import torch

    from fluid_core.training.native import without_extensions

    torch.set_num_threads(1)
    without_extensions()
    deepspeed.init_distributed("gloo")
    results.put(work())
    torch.distributed.destroy_process_group()


# What is measured in them.


def _bf16() -> bool:
    import torch

    from fluid_core.precision import computes_bf16

    return computes_bf16(torch.device("cpu"))


def _recipe(optimizer: str, workers: int = 1) -> Any:
    from fluid_core.config import ModelConfig, TrainingConfig

    precision = "bf16" if _bf16() else "fp32"
    model = ModelConfig(
        preset="fluid-tiny", grid=4, text_width=128, max_text_tokens=32, objective="flow", head_precision=precision
    )
    training = TrainingConfig(
        batch_size=BATCH * workers, workers=workers, zero_stage=3, optimizer=optimizer, learning_rate=1.5e-3, max_steps=10**6
    )
    return model, training


def _batch(model: Any, seed: int) -> tuple[Any, ...]:
    import torch

    from fluid_core.model.draws import draw_training

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(BATCH, model.num_tokens, model.token_channels, generator=generator)
    text = torch.randn(BATCH, 16, model.text_width, generator=generator)
    draws = draw_training(model, torch.arange(BATCH) + seed * BATCH, model.num_tokens)
    return tokens, text, torch.ones(BATCH, 16, dtype=torch.bool), text[0], draws


def _engine_step(engine: Any, batch: tuple[Any, ...]) -> None:
    out = engine.forward(*batch)
    engine.backward(out.loss_sum / out.count)
    engine.step()


class _PlainMuon:
    """Muon on whole matrices in one process, stacked by shape: what `FluidOptimizer` does without partitions.

    torch.optim.Muon works in bf16 alone, which many CPUs emulate at a tenth of their speed: it would measure that.
    """

    def __init__(self, matrices: list[Any], iterations: int, dtype: Any):
        import torch

        self.iterations, self.dtype = iterations, dtype
        self.by_shape: dict[tuple[int, ...], list[tuple[Any, Any]]] = {}
        for p in matrices:
            self.by_shape.setdefault(tuple(p.shape), []).append((p, torch.zeros_like(p)))

    def step(self) -> None:
        import torch

        from fluid_core.muon import muon_update

        with torch.no_grad():
            for members in self.by_shape.values():
                for p, momentum in members:
                    momentum.lerp_(p.grad, 0.05)
                updates = torch.stack([p.grad.lerp(momentum, 0.95).to(self.dtype) for p, momentum in members])
                for (p, _), update in zip(members, muon_update(updates, self.iterations), strict=True):
                    p.mul_(1 - 3e-3 * 0.02).add_(update, alpha=-3e-3)
                    p.grad = None

    def zero_grad(self) -> None:
        """Done by `step`."""


def _alternate(optimizer: str) -> dict[str, float]:
    """Median CPU seconds of one step: the engine's, and the plain loop's on the same batches."""
    import torch

    from fluid_core.model.fluid import FluidModel
    from fluid_core.muon import hidden_matrices
    from fluid_core.training.engine import Engine

    model_config, training = _recipe(optimizer)
    engine = Engine(model_config, training, seed=0)
    engine.set_learning_rate(1.0)
    torch.manual_seed(0)
    model = FluidModel(model_config)
    hidden = dict(hidden_matrices(model)) if optimizer == "muon" else {}
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    optimizers: list[Any] = [torch.optim.AdamW(rest, lr=1.5e-3, fused=True)]
    if hidden:
        optimizers.append(_PlainMuon(list(hidden.values()), training.muon_iterations, engine.optimizer.dtype))
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(WARM_UP + STEPS):
        batch = _batch(model_config, step)
        started = time.process_time()
        _engine_step(engine, batch)
        middle = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=_bf16()):
            out = model(*batch)
        (out.loss_sum / out.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        times[0].append(middle - started)
        times[1].append(time.process_time() - middle)
    return {"ours": statistics.median(times[0][WARM_UP:]), "plain": statistics.median(times[1][WARM_UP:])}


def _steps_only() -> dict[str, float]:
    """Median seconds of a step with Muon: of CPU, which a worker computes and copies in, and of wall time, with its waiting."""
    import torch

    from fluid_core.training.engine import Engine

    model_config, training = _recipe("muon", torch.distributed.get_world_size())
    engine = Engine(model_config, training, seed=0)
    engine.set_learning_rate(1.0)
    cpu, wall = [], []
    for step in range(WARM_UP + STEPS):
        batch = _batch(model_config, step)
        started = time.process_time(), time.monotonic()
        _engine_step(engine, batch)
        cpu.append(time.process_time() - started[0])
        wall.append(time.monotonic() - started[1])
    return {"CPU": statistics.median(cpu[WARM_UP:]), "wall": statistics.median(wall[WARM_UP:])}


def _checkpoint_stall() -> dict[str, float]:
    """Seconds that `save` keeps the training thread (the least of three), and those of a step."""
    from fluid_core.training.checkpoint import Checkpointer
    from fluid_core.training.ema import ShardedEMA
    from fluid_core.training.engine import Engine

    model_config, training = _recipe("adamw")
    engine = Engine(model_config, training, seed=0)
    engine.set_learning_rate(1.0)
    stalls, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(folder, engine.partitions, engine.optimizer, ShardedEMA(engine.partitions, 0.99), 2, None)
        for step in range(WARM_UP + 3):
            started = time.monotonic()
            _engine_step(engine, _batch(model_config, step))
            steps.append(time.monotonic() - started)
            if step >= WARM_UP:
                started = time.monotonic()
                checkpointer.save(step, {}, "bench")
                stalls.append(time.monotonic() - started)
                checkpointer.wait()
    return {"stall": min(stalls), "step": min(steps[WARM_UP:])}


def _write_dataset(root: Path, rows: int = 2048) -> None:
    """An encoded data set of the model's shapes in two files, with captions of 4 to 15 tokens."""
    import torch

    from fluid_core.latents.manifest import Manifest, Shard
    from fluid_core.latents.writer import file_sha256, latents_writer, null_text, tensor_bytes, text_writer

    (root / "latents").mkdir()
    (root / "text").mkdir()
    shards = []
    for name in ("a", "b"):
        n = rows // 2
        keys = [f"{name}{i}" for i in range(n)]
        latents = latents_writer(root / "latents" / f"{name}.parquet", "kl", False, {})
        latents.write_group(
            {
                "key": keys, "sha256": keys, "captions": [["a caption"]] * n, "width": [64] * n, "height": [64] * n,
                "crop": [[0, 0, 64, 64]] * n, "latent_size": [[8, 8]] * n, "token_ids": [[b"\1\0"]] * n, "metadata": ["{}"] * n,
                "moments": tensor_bytes(torch.randn(n, 8, 8, 8).bfloat16()),
            }
        )  # fmt: skip
        latents.close()
        texts = text_writer(root / "text" / f"{name}.parquet", {})
        states = [torch.randn(4 + i % 12, 128).bfloat16().view(torch.int16).numpy().tobytes() for i in range(n)]
        texts.write_group({"key": keys, "embeddings": [[s] for s in states]})
        texts.close()
        files = [root / folder / f"{name}.parquet" for folder in ("latents", "text")]
        shards.append(
            Shard(
                id=name, uri=name, rows=n, row_groups=[n], bytes=files[0].stat().st_size, sha256=file_sha256(files[0]),
                text_bytes=files[1].stat().st_size, text_sha256=file_sha256(files[1]),
            )
        )  # fmt: skip
    manifest = Manifest(
        kind="kl", image_size=64, latent_shape=[4, 8, 8], encoders={"image": {}, "text": {"width": 128}}, latent_mean=[0.0] * 4,
        latent_std=[1.0] * 4, text_mode="embeddings", text_dtype="bf16", token_dtype="uint16",
        null_text=null_text([1], torch.zeros(1, 128)), counts={}, shards=shards,
    )  # fmt: skip
    (root / "manifest.json").write_text(manifest.dumps())


def _train_from_files(folder: str) -> dict[str, float]:
    """Seconds that a step waits for its batch and takes (means), and images per CPU second of loader and trainer."""
    from fluid_core.latents.reader import EncodedDataset
    from fluid_core.training.engine import Engine
    from fluid_core.training.loader import Loader, Slicing

    model_config, training = _recipe("adamw")
    loader = Loader([(EncodedDataset(folder), 1.0)], model_config, 0, Slicing(BATCH, 0, 1, None))
    loader.batches(0)
    started = time.process_time()
    for start in range(BATCH, 17 * BATCH, BATCH):
        loader.batches(start)
    per_batch = (time.process_time() - started) / 16
    engine = Engine(model_config, training, seed=0)
    engine.set_learning_rate(1.0)
    waits, steps, cpu = [], [], []
    stream = loader.stream(0)
    for _ in range(WARM_UP + STEPS):
        started = time.monotonic()
        (batch,) = next(stream)
        ready, computed = time.monotonic(), time.thread_time()
        _engine_step(engine, (batch.tokens, batch.text_BLE, batch.text_mask_BL, loader.collator.null_text_LE, batch.draws))
        cpu.append(time.thread_time() - computed)
        waits.append(ready - started)
        steps.append(time.monotonic() - started)
    stream.close()
    return {
        "wait": statistics.mean(waits[WARM_UP:]), "step": statistics.mean(steps[WARM_UP:]), "loader": BATCH / per_batch,
        "trainer": BATCH / statistics.median(cpu[WARM_UP:]),
    }  # fmt: skip


if __name__ == "__main__":
    from benchmarks.run import as_table

    print(as_table([row for part in sys.argv[1:] or PARTS for row in PARTS[part]()]))
