"""The order of training samples: a pure function of (manifest hash, seed, position), at any world size.

A run walks along global positions 0, 1, 2, ... and batch b is positions [b * batch_size, (b + 1) * batch_size). Which row of
which data set stands at a position:

    mixture    every block of 1024 positions holds a fixed number of samples of each data set, in a shuffled order; a data
               set may join after some steps (a curriculum)
    data set   in each epoch the row groups are shuffled and cut into windows of about `window` rows; rows are shuffled
               within a window, so that one window is all that must be in memory

Everything can be computed for any position without walking there, which makes a resume exact and free.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fluid_core.random import permutation

BLOCK = 1024


def derive_key(*parts: str | int) -> int:
    """A 63-bit key from names and numbers."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def shuffled(n: int, *parts: str | int) -> np.ndarray:
    """A permutation of 0..n-1 that depends on `parts` alone: int64."""
    return permutation(torch.tensor([derive_key(*parts)]), 0, n)[0].numpy()


@dataclass(frozen=True)
class Window:
    """Row groups shuffled together: `groups` are (shard, group, rows) in reading order, `start` their first place in the epoch."""

    start: int
    rows: int
    groups: tuple[tuple[int, int, int], ...]


class DatasetOrder:
    """The order of one data set: `windows(epoch)` and, in each, the row that stands at each place."""

    def __init__(self, row_groups: list[tuple[int, int, int]], manifest_hash: str, seed: int, window: int):
        self.row_groups = [g for g in row_groups if g[2]]
        self.rows = sum(g[2] for g in self.row_groups)
        self.window = window
        self._name = (manifest_hash, seed)
        self.windows = lru_cache(maxsize=4)(self._windows)
        self.places = lru_cache(maxsize=4)(self._places)

    def _windows(self, epoch: int) -> list[Window]:
        windows: list[Window] = []
        start, rows = 0, 0
        groups: list[tuple[int, int, int]] = []
        for index in shuffled(len(self.row_groups), "groups", *self._name, epoch):
            group = self.row_groups[int(index)]
            if groups and rows + group[2] > self.window:
                windows.append(Window(start, rows, tuple(groups)))
                start, rows, groups = start + rows, 0, []
            groups.append(group)
            rows += group[2]
        windows.append(Window(start, rows, tuple(groups)))
        return windows

    def window_of(self, position: int) -> tuple[int, int]:
        """(epoch, window number) in which the data set's position lies."""
        epoch, place = divmod(position, self.rows)
        return epoch, bisect.bisect_right([w.start for w in self.windows(epoch)], place) - 1

    def _places(self, epoch: int, number: int) -> np.ndarray:
        window = self.windows(epoch)[number]
        return shuffled(window.rows, "rows", *self._name, epoch, number)


class MixtureOrder:
    """Which data set stands at each global position, and as its how-manieth sample.

    Args:
        weights: the data sets' shares.
        begins: the global position at which each data set joins, rounded up to a whole block; from the start by default.
    """

    def __init__(self, weights: list[float], seed: int, begins: Sequence[int] = ()):
        joins = [-(-begin // BLOCK) for begin in begins] or [0] * len(weights)
        if min(joins):
            raise ValueError("training.datasets: one data set at least must have from_step 0")
        self._first = sorted(set(joins))
        self._counts = [_shares([w * (join <= block) for w, join in zip(weights, joins, strict=True)]) for block in self._first]
        # How many samples of each data set come before a phase.
        self._before = [np.zeros(len(weights), dtype=np.int64)]
        for first, end, counts in zip(self._first, self._first[1:], self._counts, strict=False):
            self._before.append(self._before[-1] + (end - first) * counts)
        self._labels = [np.repeat(np.arange(len(weights)), counts) for counts in self._counts]
        self._seed = seed
        self._block = lru_cache(maxsize=64)(self._make_block)

    def phase(self, position: int) -> int:
        """How many times data sets have joined at a global position."""
        return self._phase(position // BLOCK)

    def _phase(self, block: int) -> int:
        return bisect.bisect_right(self._first, block) - 1

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        phase = self._phase(block)
        labels = self._labels[phase]
        if len(self._counts[phase]) == 1:
            return labels, np.arange(BLOCK)
        labels = labels[shuffled(BLOCK, "mixture", self._seed, block)]
        within = np.empty(BLOCK, dtype=np.int64)
        for index in range(len(self._counts[phase])):
            chosen = labels == index
            within[chosen] = np.arange(int(chosen.sum()))
        return labels, within

    def _start(self, dataset: int, block: int) -> int:
        """The first position of a data set in a block."""
        phase = self._phase(block)
        return int(self._before[phase][dataset] + (block - self._first[phase]) * self._counts[phase][dataset])

    def locate(self, position: int) -> tuple[int, int]:
        """(data set, its position) at a global position."""
        block, place = divmod(position, BLOCK)
        labels, within = self._block(block)
        dataset = int(labels[place])
        return dataset, self._start(dataset, block) + int(within[place])

    def global_positions(self, dataset: int, start: int, stop: int) -> np.ndarray:
        """The global positions of a data set's positions [start, stop): the inverse of `locate`."""
        phase = max(k for k, before in enumerate(self._before) if before[dataset] <= start and self._counts[k][dataset])
        block = self._first[phase] + (start - int(self._before[phase][dataset])) // int(self._counts[phase][dataset])
        out = []
        while (first := self._start(dataset, block)) < stop:
            places = np.flatnonzero(self._block(block)[0] == dataset) + block * BLOCK
            out.append(places[max(0, start - first) : stop - first])
            block += 1
        return np.concatenate(out)

    def seen(self, dataset: int, position: int) -> float:
        """About how many samples of a data set come before a global position: exact at a block's start."""
        block, place = divmod(position, BLOCK)
        return self._start(dataset, block) + place / BLOCK * float(self._counts[self._phase(block)][dataset])


def _shares(weights: list[float]) -> np.ndarray:
    """How many of a block's samples each data set gets: int64, their sum is BLOCK."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.floor(shares).astype(np.int64)
    for index in np.argsort(-(shares - counts), kind="stable")[: BLOCK - counts.sum()]:
        counts[index] += 1
    if ((counts == 0) & (shares > 0)).any():
        raise ValueError(
            f"training.datasets: weight {min(w for w in weights if w)} is less than 1/{BLOCK} of the sum; raise it"
        )
    return counts
