"""Fluid: text aligner, trunk and head put together, and the training loss.

    z = trunk(visible tokens, aligner(T5(caption)))
    loss = mean over masked tokens of -log p(token | z), by diffusion or softmax

Shapes: B batch, N tokens, C token channels, L text tokens, E text width, D width, R timesteps for each token, K tokens at
the head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluid_core.config.model import ModelConfig
from fluid_core.diffusion.objectives import add_noise, head_outputs, token_loss
from fluid_core.model.aligner import TextAligner
from fluid_core.model.draws import TrainingDraws
from fluid_core.model.head import CodeBook, CodeHead, DiffusionHead
from fluid_core.model.layers import Linear, on_cpu, padding_bias
from fluid_core.model.trunk import Trunk


@dataclass
class FluidLoss:
    """`loss_sum`: fp32, the sum over masked tokens. `count`: masked tokens; divide by its sum over all ranks.

    For logging, detached, one entry for each token and timestep at the head, flattened (R, K): `per_token` losses,
    `timesteps` in (0, 1) (0 for discrete tokens), the sample's `mask_ratio`, and `weights`: what the token counts in the sum
    (0 for padding, which only `masked_tokens_per_image` makes).
    """

    loss_sum: Tensor
    count: int
    per_token: Tensor
    timesteps: Tensor
    mask_ratio: Tensor
    weights: Tensor


class FluidModel(nn.Module):
    """All four variants: tokens continuous or discrete, order random or raster."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.aligner = TextAligner(config.text_width, config.max_text_tokens, width, config.heads, config.aligner_blocks)
        continuous = config.tokens == "continuous"
        embed: Any = Linear(config.token_channels, width) if continuous else CodeBook(config.codebook_size, width)
        self.trunk = Trunk(embed, config.grid, width, config.heads, config.blocks, causal=config.order == "raster")
        if continuous:
            channels, as_trunk = config.token_channels, config.head_precision == "bf16"
            outputs = head_outputs(config.objective, channels)
            self.head: Any = DiffusionHead(width, config.head_width, config.head_blocks, channels, outputs, as_trunk)
        else:
            self.head = CodeHead(width)

    def forward(
        self,
        tokens: Tensor,
        text_BLE: Tensor,
        text_mask_BL: Tensor,
        null_text_LE: Tensor,
        draws: TrainingDraws,
        grid: tuple[int, int] | None = None,
    ) -> FluidLoss:
        """The loss of one batch.

        Args:
            tokens: normalised tokens fp32 (B, N, C), or codes int64 (B, N).
            text_BLE, text_mask_BL: states of the text encoder, padded, and which of them are valid (bool).
            null_text_LE: the states of the empty caption, which replace a caption where `draws.drop_text_B`.
            draws: from `draw_training` with the batch's keys.
            grid: (h, w) when not the square of the configuration.
        """
        grid = self._check(tokens, text_BLE, text_mask_BL, null_text_LE, draws, grid)
        text_BLE, text_mask_BL = drop_captions(text_BLE, text_mask_BL, null_text_LE, draws.drop_text_B)
        # Flash attention wants half precision and heads of a multiple of eight channels.
        ragged = text_BLE.is_cuda and torch.is_autocast_enabled("cuda") and self.config.width // self.config.heads % 8 == 0
        text_TD, packing = self.aligner(text_BLE, text_mask_BL, ragged)
        text = self.trunk.text_keys_values(text_TD, packing)
        text_hidden = packing if ragged else padding_bias(text_mask_BL)
        # Compiled blocks want static shapes: on GPUs the last one finishes all tokens.
        rows_K = draws.rows_K if on_cpu(tokens) else None
        z = self.trunk(tokens, draws.mask_BN, grid, text, text_hidden, rows_K=rows_K)
        z_KD = z.flatten(0, 1)[draws.rows_K] if rows_K is None else z
        target = tokens.flatten(0, 1)[draws.rows_K]
        loss_RK = (
            self._continuous_loss(z_KD, target, draws) if self.config.tokens == "continuous" else self._code_loss(z_KD, target)
        )
        R = loss_RK.shape[0]
        return FluidLoss(
            loss_sum=(loss_RK.mean(0) * draws.weights_K).sum(),
            count=draws.count,
            per_token=loss_RK.detach().flatten(),
            timesteps=(draws.times_RK if len(draws.times_RK) else torch.zeros_like(loss_RK)).flatten(),
            mask_ratio=draws.mask_ratio_B[draws.rows_K // tokens.shape[1]].repeat(R),
            weights=draws.weights_K.repeat(R),
        )

    def _continuous_loss(self, z_KD: Tensor, x0_KC: Tensor, draws: TrainingDraws) -> Tensor:
        # The R timesteps are a leading dimension that broadcasts against the tokens: nothing is repeated, so no condition
        # can end up beside another token's target.
        objective, x0_KC = self.config.objective, x0_KC.float()
        x_t_RKC, steps_RK = add_noise(objective, x0_KC, draws.noise_RKC, draws.times_RK)
        condition_KW = self.head.embed_condition(z_KD)
        # A CPU takes one timestep after the other: its caches hold one, and each reuses the memory of the one before.
        size = 1 if on_cpu(condition_KW) else len(x_t_RKC)
        parts = zip(x_t_RKC.split(size), steps_RK.split(size), strict=True)
        prediction = torch.cat([self.head(x_t, steps, condition_KW) for x_t, steps in parts])
        return token_loss(objective, prediction, x0_KC, draws.noise_RKC, x_t_RKC, draws.times_RK)

    def _code_loss(self, z_KD: Tensor, codes_K: Tensor) -> Tensor:
        return F.cross_entropy(self.trunk.embed(self.head(z_KD), logits=True), codes_K, reduction="none")[None]

    def _check(
        self, tokens: Tensor, text: Tensor, mask: Tensor, null: Tensor, draws: TrainingDraws, grid: tuple[int, int] | None
    ) -> tuple[int, int]:
        grid = grid or (self.config.grid, self.config.grid)
        B, N = draws.mask_BN.shape
        continuous = self.config.tokens == "continuous"
        wanted = (B, grid[0] * grid[1], self.config.token_channels) if continuous else (B, grid[0] * grid[1])
        right_dtype = tokens.is_floating_point() if continuous else tokens.dtype == torch.int64
        if tuple(tokens.shape) != wanted or wanted[1] != N or not right_dtype:
            kind = "floating-point" if continuous else "int64"
            raise ValueError(
                f"tokens must be {kind} {wanted}, got {tokens.dtype} {tuple(tokens.shape)} with draws for {(B, N)}"
            )
        if text.shape != (*mask.shape, self.config.text_width) or len(text) != B or mask.dtype != torch.bool:
            raise ValueError(
                f"text must be ({B}, L, {self.config.text_width}) with a bool mask ({B}, L), "
                f"got {tuple(text.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        if null.ndim != 2 or null.shape[1] != self.config.text_width or len(null) > self.config.max_text_tokens:
            wanted_null = f"(L, {self.config.text_width}) of at most {self.config.max_text_tokens} tokens"
            raise ValueError(f"null_text must be {wanted_null}, got {tuple(null.shape)}")
        if text.shape[1] > self.config.max_text_tokens:
            raise ValueError(f"text of {text.shape[1]} tokens is longer than max_text_tokens {self.config.max_text_tokens}")
        return grid


def drop_captions(text_BLE: Tensor, mask_BL: Tensor, null_LE: Tensor, drop_B: Tensor) -> tuple[Tensor, Tensor]:
    """Put the empty caption's states in the place of the captions to drop."""
    L, length = text_BLE.shape[1], null_LE.shape[0]
    if length > L:
        text_BLE, mask_BL = F.pad(text_BLE, (0, 0, 0, length - L)), F.pad(mask_BL, (0, length - L))
    padded_LE = F.pad(null_LE.to(text_BLE.dtype), (0, 0, 0, text_BLE.shape[1] - length))
    valid_L = torch.arange(text_BLE.shape[1], device=mask_BL.device) < length
    return torch.where(drop_B[:, None, None], padded_LE, text_BLE), torch.where(drop_B[:, None], valid_L, mask_BL)
