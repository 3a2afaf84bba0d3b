"""Which tokens an edit makes anew.

Editing needs no training of its own: the tokens to change are masked again, the others are given, and the model fills in.

Shapes: h w token grid, N = h * w tokens, H W pixels.
"""

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_core.model.orders import token_order
from fluid_core.random import sample_keys

_VARIATION_STREAM = 2


def tokens_to_change(mask_HW: Tensor, grid: tuple[int, int], dilate: int = 1) -> Tensor:
    """Tokens (bool, N) that a pixel mask (bool, H x W, True = change) touches, grown by `dilate` rings.

    The ring is needed because the tokens beside a hole have seen into it through the tokenizer's receptive field: kept, they
    would carry the hole's old edge into the new picture (the rule of MAGE's author).
    """
    h, w = grid
    H, W = mask_HW.shape
    if not isinstance(dilate, Integral) or dilate < 0:
        raise ValueError(f"dilate must be a number of token rings, 0 or more, got {dilate!r}")
    if H % h or W % w:
        raise ValueError(f"a mask of {W}x{H} pixels does not divide into {w}x{h} tokens")
    touched = F.max_pool2d(mask_HW.float()[None, None], (H // h, W // w))
    for _ in range(dilate):
        touched = F.max_pool2d(touched, 3, stride=1, padding=1)
    return touched.flatten().bool()


def variation_tokens(strength: float, seed: int, grid: tuple[int, int]) -> Tensor:
    """A random share `strength` of the tokens (bool, N), at least one: a variation makes these anew."""
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength!r}")
    N = grid[0] * grid[1]
    order_N = token_order("random", sample_keys(seed, torch.zeros(1, dtype=torch.int64)), grid, _VARIATION_STREAM)[0]
    chosen_N = torch.zeros(N, dtype=torch.bool)
    chosen_N[order_N[: max(1, round(strength * N))]] = True
    return chosen_N
