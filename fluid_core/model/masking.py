"""Which share of an image's tokens is masked in training.

Shapes: B samples, N tokens.
"""

import math

import torch
from torch import Tensor


def mask_ratio(law: str, uniform_B: Tensor) -> Tensor:
    """The masked share in (0, 1) of each sample from a uniform draw u: fp32 (B,).

    cosine (Fluid, after MaskGIT): cos(pi u / 2), mean 0.64.
    truncnorm (MAR): normal(1, 0.25) truncated to [0.7, 1], by its inverse distribution function, mean 0.87.
    """
    if law == "cosine":
        return torch.cos(math.pi / 2 * uniform_B)
    if law == "truncnorm":
        low = 0.5 * (1 + math.erf((0.7 - 1.0) / 0.25 / math.sqrt(2)))
        quantile_B = (low + uniform_B.double() * (0.5 - low)).clamp(max=0.5)
        return (1.0 + 0.25 * torch.special.ndtri(quantile_B)).float()
    raise ValueError(f"unknown mask_law {law!r}; one of cosine, truncnorm")


def masked_counts(ratio_B: Tensor, num_tokens: int) -> Tensor:
    """ceil(N * ratio), at least 1: int64 (B,)."""
    return torch.ceil(ratio_B * num_tokens).long().clamp(1, num_tokens)


def mask_last(order_BN: Tensor, count_B: Tensor) -> Tensor:
    """True for the `count` tokens that come last in each sample's order: bool (B, N)."""
    rank_BN = order_BN.argsort(dim=1)
    return rank_BN >= order_BN.shape[1] - count_B[:, None]
