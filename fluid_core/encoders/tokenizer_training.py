"""The training loop of the tokenizer, as one Ray Train worker runs it.

Every draw (which images, the posterior's noise) is a function of (seed, step), and a checkpoint holds weights, optimiser,
average and step: a run that was killed goes on from its last checkpoint to the same weights as one that was not.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fluid_core.config import ImageTokenizerConfig, TokenizerTrainingConfig
from fluid_core.encoders.autoencoder import Autoencoder, Codebook, build_tokenizer
from fluid_core.encoders.image import DiffusersModel, ImageTokenizer
from fluid_core.encoders.pixels import PixelSet, open_pixels, to_float
from fluid_core.encoders.quality import reconstruction_grid, reconstruction_psnr
from fluid_core.encoders.tokenizer_optimizer import TokenizerOptimizer
from fluid_core.precision import computes_bf16
from fluid_core.random import normal, sample_keys
from fluid_core.workflow.stage import write_json_atomic

PROGRESS = "metrics.jsonl"
CHECKPOINT = "last.pt"
REPORT_EVERY = 20
PSNR_IMAGES = 64  # of each data set while training; all of them at the end


class Mixture:
    """Which images a step sees: data sets by weight, images at random, the same for every number of workers."""

    def __init__(self, sets: list[PixelSet], weights: dict[str, float], seed: int):
        unknown = sorted(set(weights) - {s.name for s in sets})
        if unknown:
            names = ", ".join(s.name for s in sets)
            raise ValueError(f"image_tokenizer.train.weights names {unknown[0]!r}; the data sets are {names}")
        share = np.array([weights.get(s.name, float(len(s.images)) if not weights else 0.0) for s in sets])
        if not share.sum() > 0:
            raise ValueError("image_tokenizer.train.weights: at least one data set needs a weight above 0")
        self.sets, self.share, self.seed = sets, share / share.sum(), seed

    def batch(self, step: int, size: int, rank: int, world: int) -> Tensor:
        """This rank's part of the step's images, uint8 (size / world, 3, S, S)."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        chosen = random.choice(len(self.sets), size=size, p=self.share)
        position = random.random(size)
        mine = range(rank * size // world, (rank + 1) * size // world)
        rows = [self.sets[chosen[i]].images[int(position[i] * len(self.sets[chosen[i]].images))] for i in mine]
        return torch.stack(rows)


def learning_rate_factor(step: int, config: TokenizerTrainingConfig) -> float:
    """Linear warm-up, then a straight line to zero at the last step."""
    return min(1.0, (step + 1) / config.warmup_steps) * (1.0 - step / config.max_steps)


def train_tokenizer_worker(settings: dict[str, Any]) -> None:
    """Train on this rank; rank 0 writes progress, checkpoints and, at the end, the model folder and `result.json`.

    Args:
        settings: "image_tokenizer" (ImageTokenizerConfig dump), "image_size", "seed", "work" (a folder that all workers
            reach), "train_sets" and "heldout_sets" (names of pixel files in it), "fingerprint".
    """
    rank, world, device = _setup()
    tokenizer_config = ImageTokenizerConfig.model_validate(settings["image_tokenizer"])
    config = tokenizer_config.train
    assert config is not None
    work, seed = Path(settings["work"]), settings["seed"]
    mixture = Mixture(open_pixels(work / "train", settings["train_sets"]), config.weights, seed)

    torch.manual_seed(seed)
    model = build_tokenizer(tokenizer_config, settings["image_size"])
    module = Autoencoder(model, config).to(device).train()
    optimizer = TokenizerOptimizer(model, config)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    codebook = Codebook(model) if tokenizer_config.kind == "vq" else None
    first = _load(work, settings["fingerprint"], model, optimizer, average)
    if codebook is not None and first and rank == 0:
        codebook.used = torch.load(work / CHECKPOINT, weights_only=True)["used"]
    replicated = DistributedDataParallel(module, gradient_as_bucket_view=True) if world > 1 else module

    stride = config.pixel_unshuffle * 2 ** (len(config.block_out_channels) - 1)
    latent_shape = (config.latent_channels, settings["image_size"] // stride, settings["image_size"] // stride)
    progress = _Progress(work / PROGRESS, first) if rank == 0 else None
    for step in range(first, config.max_steps):
        images = to_float(mixture.batch(step, config.batch_size, rank, world).to(device))
        ids = step * config.batch_size + rank * config.batch_size // world + torch.arange(len(images))
        noise = normal(sample_keys(seed, ids), 0, latent_shape).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
            loss, parts, hidden = replicated(images, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(learning_rate_factor(step, config))
        if codebook is not None and hidden is not None:
            codebook.count(hidden)
            # The last fifth is left alone, so that every code is where its images want it.
            if step == 0 or (step % Codebook.EVERY == 0 and step < 0.8 * config.max_steps):
                codebook.revive(hidden, step)
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1.0 - decay)
        if progress is not None and ((step + 1) % REPORT_EVERY == 0 or step + 1 == config.max_steps):
            progress.report(step + 1, {"loss": loss.item(), **{k: v.item() for k, v in parts.items()}})
        if (step + 1) % config.checkpoint_every or step + 1 == config.max_steps:
            continue
        if codebook is not None:
            codebook.gather()
        if rank == 0:
            _save(work, settings["fingerprint"], step + 1, model, optimizer, average, codebook)
            psnr = _evaluate(model, tokenizer_config, average, work, settings["heldout_sets"], PSNR_IMAGES)
            assert progress is not None
            progress.report(step + 1, {f"psnr_{name}": value for name, value in psnr.items()})
    if rank == 0:
        _finish(model, tokenizer_config, average, work, settings)
    if world > 1:
        torch.distributed.barrier()


class _Progress:
    """Lines of JSON that the driver reads: {"step", "seconds", ...}. Lines past a resumed step are dropped."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first] if first else []
        path.write_text("".join(line + "\n" for line in kept))
        self.path, self.started = path, time.monotonic()

    def report(self, step: int, values: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "seconds": round(time.monotonic() - self.started, 2), **values}) + "\n")


def _setup() -> tuple[int, int, torch.device]:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    return context.get_world_rank(), context.get_world_size(), device


def _save(
    work: Path,
    fingerprint: str,
    step: int,
    model: DiffusersModel,
    optimizer: TokenizerOptimizer,
    average: dict[str, Tensor],
    codebook: Codebook | None,
) -> None:
    state = {
        "fingerprint": fingerprint,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "used": codebook.used if codebook else None,
    }
    partial = work / f".{CHECKPOINT}.partial"
    torch.save(state, partial)
    os.replace(partial, work / CHECKPOINT)


def _load(
    work: Path,
    fingerprint: str,
    model: DiffusersModel,
    optimizer: TokenizerOptimizer,
    average: dict[str, Tensor],
) -> int:
    """Restore the last checkpoint of this very run; returns the step to go on with, 0 without one."""
    path = work / CHECKPOINT
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["fingerprint"] != fingerprint:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return state["step"]


def _averaged(model: DiffusersModel, config: ImageTokenizerConfig, average: dict[str, Tensor]) -> ImageTokenizer:
    """A tokenizer with the averaged weights, on the CPU-or-GPU device of `model`; `model` itself is untouched."""
    copy = type(model).from_config(model.config)
    copy.load_state_dict({**model.state_dict(), **average})
    return ImageTokenizer(copy.to(next(model.parameters()).device), config.kind)


def _evaluate(
    model: DiffusersModel,
    config: ImageTokenizerConfig,
    average: dict[str, Tensor],
    work: Path,
    names: list[str],
    limit: int | None,
) -> dict[str, float]:
    tokenizer = _averaged(model, config, average)
    sets = open_pixels(work / "heldout", names)
    return {s.name: reconstruction_psnr(tokenizer, s.images[:limit]) for s in sets}


def _finish(
    model: DiffusersModel,
    config: ImageTokenizerConfig,
    average: dict[str, Tensor],
    work: Path,
    settings: dict[str, Any],
) -> None:
    tokenizer = _averaged(model, config, average)
    sets = open_pixels(work / "heldout", settings["heldout_sets"])
    metrics = {f"psnr_{s.name}": reconstruction_psnr(tokenizer, s.images) for s in sets}
    if config.kind == "vq":
        codes = torch.cat([tokenizer.encode(to_float(s.images[:256])).flatten() for s in sets])
        share = torch.bincount(codes.cpu(), minlength=tokenizer.codebook_size).double() / codes.numel()
        metrics["codes_used"] = float((share > 0).double().mean())
        metrics["perplexity"] = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
    reconstruction_grid(tokenizer, sets).save(work / "reconstructions.png")
    tokenizer.model.cpu()
    tokenizer.save_pretrained(work / "model")
    parameters = sum(p.numel() for p in tokenizer.model.parameters())
    write_json_atomic(
        work / "result.json", {"fingerprint": settings["fingerprint"], "metrics": metrics, "parameters": parameters}
    )
