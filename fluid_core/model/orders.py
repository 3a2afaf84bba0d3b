"""In which order tokens are generated, and how many at each step.

Shapes: B samples, N tokens on a grid (h, w), K autoregressive steps.
"""

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fluid_core.random import permutation

ORDERS = ("random", "raster", "checkerboard")


def token_order(kind: str, keys_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
    """The position generated first, second, ...: int64 (B, N), a permutation for each key.

    random: uniform (Fluid, MAR). raster: row by row. checkerboard: the squares of one colour in random order, then
    those of the other (the two-stage order of GtR, arXiv 2510.17171).
    """
    h, w = grid
    if keys_B.dtype != torch.int64 or keys_B.ndim != 1 or h < 1 or w < 1:
        raise ValueError(f"wanted int64 keys (batch,) and a grid, got {keys_B.dtype} {tuple(keys_B.shape)} and {grid}")
    if kind == "raster":
        return torch.arange(h * w, device=keys_B.device).expand(len(keys_B), -1)
    order_BN = permutation(keys_B, stream, h * w)
    if kind == "random":
        return order_BN
    if kind == "checkerboard":
        return order_BN.gather(1, _colour(order_BN, w).argsort(dim=1, stable=True))
    raise ValueError(f"unknown order {kind!r}; one of {', '.join(ORDERS)}")


def _colour(places: Tensor, width: int) -> Tensor:
    return (places // width + places % width) % 2


def first_stage(order_N: Tensor, grid: tuple[int, int]) -> int:
    """How many of the tokens to generate are of a checkerboard's first colour."""
    return int((_colour(order_N, grid[1]) == 0).sum())


def unmask_counts(num_tokens: int, num_steps: int, first_stage: int = 0) -> list[int]:
    """How many tokens each of `num_steps` steps generates, after the cosine schedule of MaskGIT:

        masked after step k = floor(N cos(pi/2 (k + 1) / K)),

    at least one token a step, and all that remain in the last. The sum is `num_tokens`. Of two or more steps one ends after
    the `first_stage` tokens, the one that would have ended nearest: no step mixes the stages.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"num_steps must be between 1 and the {num_tokens} tokens to generate, got {num_steps}")
    counts, masked = [], num_tokens
    for k in range(num_steps):
        left = math.floor(num_tokens * math.cos(math.pi / 2 * (k + 1) / num_steps))
        left = max(num_steps - 1 - k, min(masked - 1, left))
        counts.append(masked - left)
        masked = left
    if num_steps > 1 and 0 < first_stage < num_tokens:
        ends = list(accumulate(counts))
        nearest = min(range(num_steps - 1), key=lambda k: abs(ends[k] - first_stage))
        ends[nearest] = first_stage
        counts = [end - begin for begin, end in pairwise([0, *ends])]
    return counts
