"""Everything random in a training step, drawn up front as a pure function of each sample's key.

The draws of a sample do not depend on its batch, its worker or the world size, so a run can be killed, resumed and
re-sharded without a change in what it learns.

Shapes: B samples, N tokens, C token channels, R timesteps for each token, K tokens given to the head (over the batch).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fluid_core.config.model import ModelConfig
from fluid_core.model.masking import mask_last, mask_ratio, masked_counts
from fluid_core.model.orders import token_order
from fluid_core.random import normal, permutation, uniform

# One stream for each use of a key.
MASK_RATIO, ORDER, DROP_TEXT, TIMESTEPS, NOISE, SUBSET = range(6)


@dataclass
class TrainingDraws:
    """The random numbers of one batch.

    `mask_BN`: bool, tokens hidden from the trunk. `rows_K`: int64 indices into the B * N flattened tokens that the head
    sees. `weights_K`: fp32, what each counts in the sum of losses (1, or masked / drawn when only some masked tokens are
    drawn, or 0 for padding). `times_RK`: fp32 in (0, 1). `noise_RKC`: fp32 normal. `drop_text_B`: bool.
    `count`: masked tokens in this batch, what the global mean divides by.
    """

    mask_BN: Tensor
    mask_ratio_B: Tensor
    order_BN: Tensor
    drop_text_B: Tensor
    rows_K: Tensor
    weights_K: Tensor
    times_RK: Tensor
    noise_RKC: Tensor
    count: int

    def to(self, device: torch.device | str) -> "TrainingDraws":
        names = [f.name for f in fields(self) if f.name != "count"]
        return TrainingDraws(**{name: getattr(self, name).to(device, non_blocking=True) for name in names}, count=self.count)


def draw_training(config: ModelConfig, keys_B: Tensor, num_tokens: int, grid: tuple[int, int] | None = None) -> TrainingDraws:
    """Draw a batch's masks, orders, timesteps, noise and caption dropout from its samples' int64 keys.

    With `masked_tokens_per_image` the head sees that many masked tokens of each image, chosen uniformly among them and
    weighted by masked / chosen, so that the expected sum of losses is the one over all masked tokens.
    """
    B, N, C = len(keys_B), num_tokens, config.token_channels
    grid = grid or (1, N)
    if grid[0] * grid[1] != N:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} does not hold {N} tokens")
    order_BN = token_order(config.order, keys_B, grid, ORDER)
    if config.order == "raster":  # teacher forcing: every token is predicted from those before it
        ratio_B = torch.ones(B, device=keys_B.device)
        count_B = torch.full((B,), N, device=keys_B.device)
    else:
        ratio_B = mask_ratio(config.mask_law, uniform(keys_B, MASK_RATIO, ()))
        count_B = masked_counts(ratio_B, N)
    mask_BN = mask_last(order_BN, count_B)
    rows_K, weights_K = _head_rows(config, keys_B, mask_BN, count_B)
    R = config.timesteps_per_token if config.tokens == "continuous" else 0
    times_BRN = uniform(keys_B, TIMESTEPS, (R, N)) if config.objective == "eps" else normal(keys_B, TIMESTEPS, (R, N)).sigmoid()
    noise_BRNC = normal(keys_B, NOISE, (R, N, C))
    return TrainingDraws(
        mask_BN=mask_BN,
        mask_ratio_B=ratio_B,
        order_BN=order_BN,
        drop_text_B=uniform(keys_B, DROP_TEXT, ()) < config.caption_dropout,
        rows_K=rows_K,
        weights_K=weights_K,
        times_RK=times_BRN.transpose(0, 1).reshape(R, B * N)[:, rows_K],
        noise_RKC=noise_BRNC.transpose(0, 1).reshape(R, B * N, C)[:, rows_K],
        count=int(count_B.sum()),
    )


def _head_rows(config: ModelConfig, keys_B: Tensor, mask_BN: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    B, N = mask_BN.shape
    chosen = config.masked_tokens_per_image
    if chosen is None:
        rows_K = mask_BN.flatten().nonzero()[:, 0]
        return rows_K, torch.ones(len(rows_K), device=rows_K.device)
    if chosen > N:
        raise ValueError(f"masked_tokens_per_image {chosen} is more than the {N} tokens of an image")
    shuffled_BN = permutation(keys_B, SUBSET, N)
    masked_first_BN = shuffled_BN.gather(1, mask_BN.gather(1, shuffled_BN).long().argsort(dim=1, stable=True, descending=True))
    index_BM = masked_first_BN[:, :chosen]
    valid_BM = torch.arange(chosen, device=keys_B.device)[None, :] < count_B[:, None]
    weights_BM = valid_BM * (count_B / count_B.clamp(max=chosen))[:, None]
    rows_BM = index_BM + N * torch.arange(B, device=keys_B.device)[:, None]
    return rows_BM.flatten(), weights_BM.flatten().float()
