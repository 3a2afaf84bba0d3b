"""The order of training samples: a pure function of (manifest hash, seed, position), at any world size.

A run walks along global positions 0, 1, 2, ... and batch b is positions [b * batch_size, (b + 1) * batch_size). Which row of
which data set stands at a position:

    mixture    every block of 1024 positions holds a fixed number of samples of each data set, in a shuffled order
    data set   in each epoch the row groups are shuffled and cut into windows of about `window` rows; rows are shuffled
               within a window, so that one window is all that must be in memory

Everything can be computed for any position without walking there, which makes a resume exact and free.
"""

import bisect
import hashlib
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
    """Which data set stands at each global position, and as its how-manieth sample."""

    def __init__(self, weights: list[float], seed: int):
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
        counts = np.floor(shares).astype(np.int64)
        for index in np.argsort(-(shares - counts), kind="stable")[: BLOCK - counts.sum()]:
            counts[index] += 1
        if (counts == 0).any():
            raise ValueError(f"training.datasets: weight {min(weights)} is less than 1/{BLOCK} of the sum; raise it")
        self.counts = counts
        self._labels = np.repeat(np.arange(len(weights)), counts)
        self._seed = seed
        self._block = lru_cache(maxsize=64)(self._make_block)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self.counts) == 1:
            return self._labels, np.arange(BLOCK)
        labels = self._labels[shuffled(BLOCK, "mixture", self._seed, block)]
        within = np.empty(BLOCK, dtype=np.int64)
        for index in range(len(self.counts)):
            chosen = labels == index
            within[chosen] = np.arange(int(chosen.sum()))
        return labels, within

    def locate(self, position: int) -> tuple[int, int]:
        """(data set, its position) at a global position."""
        block, place = divmod(position, BLOCK)
        labels, within = self._block(block)
        dataset = int(labels[place])
        return dataset, block * int(self.counts[dataset]) + int(within[place])

    def global_positions(self, dataset: int, start: int, stop: int) -> np.ndarray:
        """The global positions of a data set's positions [start, stop): the inverse of `locate`."""
        count = int(self.counts[dataset])
        out = []
        for block in range(start // count, (stop - 1) // count + 1):
            places = np.flatnonzero(self._block(block)[0] == dataset) + block * BLOCK
            out.append(places[max(0, start - block * count) : stop - block * count])
        return np.concatenate(out)
