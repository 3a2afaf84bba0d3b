"""What a candidate must show before it becomes champion."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluid_core.config import RegistryConfig
from fluid_core.generation.bundle import verify_bundle

IMAGE_TOLERANCE = 2.0 / 255
"""Mean absolute difference between a bundle's images and those of the checkpoint's own weights."""


@dataclass(frozen=True)
class Gate:
    """One check's outcome. `value` is logged as a metric where there is one."""

    name: str
    passed: bool
    detail: str
    value: float | None = None


def bundle_gate(folder: Path) -> Gate:
    """The files are complete and whole."""
    try:
        verify_bundle(folder)
    except ValueError as error:
        return Gate("bundle", False, str(error))
    return Gate("bundle", True, "every file has the sha256 of the manifest")


def images_gate(
    pipeline: Any, state: Iterable[tuple[str, Tensor]], prompts: list[str], seed: int
) -> tuple[Gate, list[Image.Image]]:
    """The bundle draws what the trainer's EMA weights draw: both make the fixed prompts with the same seeds.

    `pipeline` holds the bundle's weights and is given the checkpoint's (`state`) in their place, tensor by tensor, so that a
    large model is in memory once. Returns the gate and the bundle's images.
    """
    seeds = [seed + index for index in range(len(prompts))]
    images = pipeline(prompts, seed=seeds)
    own = dict(pipeline.model.named_parameters())
    missing = set(own)
    with torch.no_grad():
        for name, tensor in state:
            if name not in own or own[name].shape != tensor.shape:
                return Gate("images", False, f"the checkpoint's {name} has no place in the bundle"), images
            own[name].copy_(tensor)
            missing.discard(name)
    if missing:
        return Gate("images", False, f"the checkpoint lacks {sorted(missing)[0]}"), images
    expected = pipeline(prompts, seed=seeds)
    difference = max(_difference(a, b) for a, b in zip(images, expected, strict=True))
    passed = difference <= IMAGE_TOLERANCE
    detail = f"{len(prompts)} fixed prompts differ from the checkpoint's by {difference:.5f} of full scale at most"
    return Gate("images", passed, detail, difference), images


def validation_gate(config: RegistryConfig, candidate: float | None, champion: float | None, same_data: bool) -> Gate:
    """The validation loss is not worse than the champion's by more than the allowed share."""
    if candidate is None:
        return Gate("validation_loss", champion is None, "the training run logged no validation loss")
    if not np.isfinite(candidate):
        return Gate("validation_loss", False, f"the validation loss is {candidate}", candidate)
    if champion is None:
        return Gate("validation_loss", True, f"{candidate:.5f}; there is no champion to compare with", candidate)
    if not same_data:
        return Gate("validation_loss", True, f"{candidate:.5f}; not compared, the champion had other data", candidate)
    limit = champion * (1 + config.max_validation_loss_increase)
    return Gate(
        "validation_loss", candidate <= limit, f"{candidate:.5f}, champion {champion:.5f}, limit {limit:.5f}", candidate
    )


def metric_gates(config: RegistryConfig, metrics: dict[str, float]) -> list[Gate]:
    """registry.minimum_metrics against the metrics of stage `evaluate`."""
    gates = []
    for name, least in config.minimum_metrics.items():
        if name not in metrics:
            known = ", ".join(sorted(metrics)) or "none of this checkpoint: run pipelines/evaluate.py first"
            gates.append(Gate(name, False, f"not among the evaluation's metrics ({known})"))
        else:
            gates.append(Gate(name, metrics[name] >= least, f"{metrics[name]:.4f}, at least {least:g}", metrics[name]))
    return gates


def _difference(a: Image.Image, b: Image.Image) -> float:
    if a.size != b.size:
        return 1.0
    one, two = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (a, b))
    return float(np.abs(one - two).mean() / 255)
