"""Counter-based random numbers: every draw is a pure function of (key, stream, index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer arithmetic, so that
a sample's mask, order, timesteps and noise do not depend on the batch it is in, the worker that draws it, or on what was
drawn before. In training the key is (seed, global sample); in generation it is the image's seed.

Shapes: B = keys (one per sample or image), the rest is the caller's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _high_low(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # 32x32 -> 64 bit product of non-negative int64 values; the wrap-around of int64 keeps the right bits.
    product = a * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words for each counter and key, held in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def sample_keys(seed: int, sample_ids: Tensor) -> Tensor:
    """One 64-bit key (int64, shape B) for each sample id (int64, shape B) under a run's seed."""
    ids = sample_ids.to(torch.int64)
    seed_low = torch.full_like(ids, seed & _MASK32)
    seed_high = torch.full_like(ids, (seed >> 32) & _MASK32)
    zero = torch.zeros_like(ids)
    w0, w1, _, _ = philox((ids & _MASK32, (ids >> 32) & _MASK32, zero, zero), (seed_low, seed_high))
    return w0 | (w1 << 32)


def _words(keys: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """(B, count) 32-bit words. `stream` separates the uses of one key; a tensor of shape B gives each key its own."""
    blocks = (count + 3) // 4
    index = torch.arange(blocks, device=keys.device, dtype=torch.int64)[None, :]
    key = keys.to(torch.int64)[:, None]
    if isinstance(stream, int):
        stream = torch.full_like(keys, stream, dtype=torch.int64)
    stream_B1 = stream.to(torch.int64)[:, None]
    zero = torch.zeros_like(index)
    counter = (index, zero, stream_B1 & _MASK32, (stream_B1 >> 32) & _MASK32)
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (key & _MASK32, (key >> 32) & _MASK32))), dim=-1)
    return words.reshape(keys.shape[0], blocks * 4)[:, :count]


def uniform(keys: Tensor, stream: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform float32 in the open interval (0, 1), shape (B, *shape), for int64 keys of shape B."""
    # 23 bits and a half: the largest value, 1 - 2^-24, is exact in float32, and neither 0 nor 1 can come out.
    words = _words(keys, stream, math.prod(shape)) >> 9
    return ((words.to(torch.float32) + 0.5) * 2.0**-23).reshape(keys.shape[0], *shape)


def normal(keys: Tensor, stream: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal float32, shape (B, *shape), by Box-Muller."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    u = uniform(keys, stream, (2, pairs))
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0]))
    angle = 2.0 * math.pi * u[:, 1]
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(1)[:, :count].reshape(keys.shape[0], *shape)


def permutation(keys: Tensor, stream: int | Tensor, n: int) -> Tensor:
    """A uniformly random permutation of 0..n-1 for each key: int64, shape (B, n)."""
    return uniform(keys, stream, (n,)).argsort(dim=1, stable=True)
