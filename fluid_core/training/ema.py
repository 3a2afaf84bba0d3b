"""The exponential moving average of the weights: fp32, sharded exactly like ZeRO's master partitions.

Warm-up: after n updates the decay is min(decay, (1 + n) / (10 + n)), so that the average is not held near its start
(parameters that begin at zero would stay there for 1 / (1 - decay) steps).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fluid_core.training.partitions import Partitions


def ema_decay(decay: float, updates: int) -> float:
    """The decay of the update that follows `updates` earlier ones."""
    return min(decay, (1 + updates) / (10 + updates))


class ShardedEMA:
    """One flat fp32 tensor for each of this worker's master buffers."""

    def __init__(self, partitions: Partitions, decay: float):
        self.decay = decay
        self.updates = 0
        self._partitions = partitions
        self.flats = [b.detach().view(-1).clone() for b in partitions.buffers]

    @torch.no_grad()
    def update(self) -> None:
        """ema <- d ema + (1 - d) weights, after an optimizer step that was applied."""
        weight = 1 - ema_decay(self.decay, self.updates)
        self.updates += 1
        for average, master in zip(self.flats, self._partitions.buffers, strict=True):
            average.lerp_(master.view(-1), weight)

    @torch.no_grad()
    def distance_squared(self) -> torch.Tensor:
        """This worker's part of ||ema - weights||^2 (replicated weights: all of it)."""
        parts = [(a - b.view(-1)).square().sum() for a, b in zip(self.flats, self._partitions.buffers, strict=True)]
        return torch.stack([p.float().cpu() for p in parts]).sum()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averaged weights inside the block. Collective."""
        raw = [b.detach().view(-1).clone() for b in self._partitions.buffers]
        self._copy(self.flats)
        try:
            yield
        finally:
            self._copy(raw)

    @torch.no_grad()
    def _copy(self, flats: list[torch.Tensor]) -> None:
        for master, values in zip(self._partitions.buffers, flats, strict=True):
            master.view(-1).copy_(values)
        self._partitions.write_back()
