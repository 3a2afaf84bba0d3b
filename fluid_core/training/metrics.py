"""What a step leaves behind: one line in metrics.jsonl, and binned losses that tell where the loss comes from."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BINS = 5


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    path = Path(path)
    return parse_metrics(path.read_text()) if path.is_file() else []


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl's text, as `read_metrics`."""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def write_metrics(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace a metrics.jsonl: a reader, and a start after a kill, find the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(temporary, path)


class MetricsFile:
    """metrics.jsonl: each step once, in order, also after a resume from an earlier step."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        write_metrics(path, [line for line in read_metrics(path) if line["step"] <= resume_step])
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - a line at a time, for the life of the run

    def write(self, values: dict[str, Any]) -> None:
        """One line; numbers that are not finite become null, since JSON has none."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class BinnedLoss:
    """Sums and counts of the loss in equal bins of the diffusion timestep and of the mask ratio; add, all-reduce, read.

    A token counts as much as it does in the loss (FluidLoss.weights), and padding not at all: the bins' sums add up to the
    loss.
    """

    def __init__(self) -> None:
        self.table = torch.zeros(2, 2, BINS, dtype=torch.float64)

    def add(self, per_token: Tensor, timesteps: Tensor, mask_ratio: Tensor, weights: Tensor) -> None:
        """All of one length, as in a FluidLoss."""
        counts = weights.detach().double().cpu()
        losses = per_token.detach().double().cpu() * counts
        for row, values in enumerate((timesteps, mask_ratio)):
            index = (values.detach().cpu() * BINS).long().clamp(0, BINS - 1)
            self.table[row, 0].index_add_(0, index, losses)
            self.table[row, 1].index_add_(0, index, counts)

    def read(self, names: Iterable[str] = ("timestep", "mask_ratio")) -> dict[str, float]:
        """{"loss_timestep/0.0-0.2": mean, ...} of the bins that hold anything; empties the table."""
        out: dict[str, float] = {}
        for name, (sums, counts) in zip(names, self.table, strict=True):
            for k in range(BINS):
                if counts[k] > 0:
                    out[f"loss_{name}/{k / BINS:.1f}-{(k + 1) / BINS:.1f}"] = float(sums[k] / counts[k])
        self.table.zero_()
        return out
