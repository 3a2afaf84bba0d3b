"""What is measured of the encoded samples, shard by shard, so that it merges: latent statistics and histograms.

Latent statistics are per channel, of samples from the posterior (Chan, Golub, LeVeque 1979: pairwise updates).

With z = mean + sqrt(var) eps: E[z] = E[mean] and Var(z) = Var(mean) + E[var], so nothing has to be drawn.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class LatentStatistics:
    """`count` values a channel; `mean`, `m2` (sum of squared deviations) and `variance` (sum of exp(logvar)), float64 (C,)."""

    count: int
    mean: Tensor
    m2: Tensor
    variance: Tensor

    @classmethod
    def empty(cls, channels: int) -> "LatentStatistics":
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros, zeros.clone(), zeros.clone())

    @classmethod
    def of(cls, moments_B2CHW: Tensor) -> "LatentStatistics":
        mean_CN, logvar_CN = (part.transpose(0, 1).flatten(1).to(torch.float64) for part in moments_B2CHW.chunk(2, dim=1))
        mean = mean_CN.mean(dim=1)
        m2 = (mean_CN - mean[:, None]).square().sum(dim=1)
        return cls(mean_CN.shape[1], mean, m2, logvar_CN.exp().sum(dim=1))

    @classmethod
    def of_bytes(cls, values: list[bytes], channels: int) -> "LatentStatistics":
        """Of stored moments: bf16 bytes of equal length, each (2 * channels, H, W)."""
        flat = torch.frombuffer(bytearray(b"".join(values)), dtype=torch.bfloat16)
        return cls.of(flat.reshape(len(values), 2 * channels, -1, 1))

    def merge(self, other: "LatentStatistics") -> "LatentStatistics":
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return LatentStatistics(count, mean, m2, self.variance + other.variance)

    @property
    def std(self) -> Tensor:
        return ((self.m2 + self.variance) / max(self.count, 1)).sqrt()

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist(), "variance": self.variance.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LatentStatistics":
        mean, m2, variance = (torch.tensor(values[name], dtype=torch.float64) for name in ("mean", "m2", "variance"))
        return cls(values["count"], mean, m2, variance)


@dataclass
class Histograms:
    """Counts by value: tokens of a caption, shorter side (bins of 64 pixels), aspect (bins of 10 percent), captions."""

    bins: dict[str, dict[int, int]] = field(
        default_factory=lambda: {name: {} for name in ("tokens", "short_side", "aspect_percent", "captions")}
    )

    def count(self, width: int, height: int, token_lengths: list[int]) -> None:
        self._add("short_side", min(width, height) // 64 * 64)
        self._add("aspect_percent", round(10 * max(width, height) / min(width, height)) * 10)
        self._add("captions", len(token_lengths))
        for length in token_lengths:
            self._add("tokens", length)

    def _add(self, name: str, value: int) -> None:
        self.bins[name][value] = self.bins[name].get(value, 0) + 1

    @property
    def total_captions(self) -> int:
        return sum(self.bins["tokens"].values())

    def as_json(self) -> dict[str, dict[str, int]]:
        return {name: {str(value): number for value, number in sorted(bins.items())} for name, bins in self.bins.items()}

    @staticmethod
    def merge(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
        """Sum of several `as_json` results."""
        merged: dict[str, dict[str, int]] = {}
        for part in parts:
            for name, bins in part.items():
                into = merged.setdefault(name, {})
                for value, number in bins.items():
                    into[value] = into.get(value, 0) + number
        return {name: dict(sorted(bins.items(), key=lambda item: int(item[0]))) for name, bins in sorted(merged.items())}
