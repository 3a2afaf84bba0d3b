"""The trunk: one stack of transformer blocks over all token places (paper, figures 2 and 3).

order random: bidirectional attention, a learned mask token in the place of every unknown token.
order raster: causal attention; place i is given token i - 1 (a learned start token at 0) and predicts token i.

Shapes: B batch, N tokens, C token channels, L text tokens, T valid ones among all B * L, D width, H heads, d = D / H.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluid_core.model.layers import MLP, Cache, CrossAttention, LayerNorm, Packing, SelfAttention, causal_bias, padding_bias
from fluid_core.model.positions import GridPositions

TextKeysValues = list[tuple[Tensor, Tensor]]
"""For each block the text's keys and values, each (B, H, L, d), or of a ragged packing (T, H, d)."""


class TrunkBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to the text, MLP: 16 D^2 weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = LayerNorm(width), SelfAttention(width, heads)
        self.norm2, self.cross = LayerNorm(width), CrossAttention(width, heads)
        self.norm3, self.mlp = LayerNorm(width), MLP(width)

    def forward(
        self,
        x_BND: Tensor,
        text: tuple[Tensor, Tensor],
        text_hidden: Tensor | Packing | None,
        self_bias: Tensor | None,
        cache: Cache | None = None,
        places_BP: Tensor | None = None,
        rows_K: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D). The last block need not finish what nobody reads: with `places_BP` only those places, (B, P, D), or with
        `rows_K` only those rows of all B * N, (K, D)."""
        attended = self.attention(self.norm1(x_BND), self_bias, cache, places_BP)
        x_BND = attended + (x_BND if places_BP is None else x_BND.take_along_dim(places_BP[..., None], dim=1))
        x_BND = x_BND + self.cross(self.norm2(x_BND), text, text_hidden)
        x = x_BND if rows_K is None else x_BND.flatten(0, 1)[rows_K]
        return x + self.mlp(self.norm3(x))


class Trunk(nn.Module):
    """Token embedding, blocks, and the condition z of every place for the head."""

    def __init__(self, embed: nn.Module, grid: int, width: int, heads: int, blocks: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.activation_checkpointing = False
        self.half_residuals = False  # under autocast; norms still compute in fp32
        self.embed = embed  # token values (..., C) or codes (...) to (..., D)
        self.placeholder = nn.Parameter(0.02 * torch.randn(width))  # the mask token, or in raster order the start token
        self.positions = GridPositions(grid, width)
        self.norm_in = LayerNorm(width)
        self.blocks: Any = nn.ModuleList(TrunkBlock(width, heads) for _ in range(blocks))
        self.norm_out = LayerNorm(width)
        self.head_positions = GridPositions(grid, width)

    def text_keys_values(self, text_TD: Tensor, packing: Packing) -> TextKeysValues:
        """Every block's keys and values of the aligned text: once for each prompt, whatever the number of steps."""
        return [block.cross.keys_values(text_TD, packing) for block in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        hidden_BN: Tensor,
        grid: tuple[int, int],
        text: TextKeysValues,
        text_hidden: Tensor | Packing | None,
        places_BP: Tensor | None = None,
        rows_K: Tensor | None = None,
    ) -> Tensor:
        """z (B, N, D) from token values (B, N, C) or codes (B, N); with `places_BP` only of those places, (B, P, D), or with
        `rows_K` only of those rows of all B * N, (K, D).

        `hidden_BN`: True for tokens that the trunk must not see; in raster order causality alone decides that.
        `text_hidden`: the bias that hides the text's padding, or the ragged packing of the keys and values.
        """
        bias = None
        if self.causal:
            tokens = tokens.roll(1, dims=1)
            hidden_BN = torch.zeros_like(hidden_BN)
            hidden_BN[:, 0] = True
            bias = causal_bias(tokens.shape[1], tokens.device)
        x_BND = self.embed_tokens(tokens, hidden_BN) + self.positions(grid)
        x_BND = self.norm_in(x_BND)
        if self.half_residuals and torch.is_autocast_enabled(x_BND.device.type):
            x_BND = x_BND.to(torch.get_autocast_dtype(x_BND.device.type))
        last = len(self.blocks) - 1
        for i, (block, keys_values) in enumerate(zip(self.blocks, text, strict=True)):
            wanted = (places_BP, rows_K) if i == last else (None, None)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, keys_values, text_hidden, bias, None, *wanted, use_reentrant=False)
            else:
                x_BND = block(x_BND, keys_values, text_hidden, bias, None, *wanted)
        positions = self.head_positions(grid)
        if rows_K is not None:
            places_BP = rows_K % len(positions)
        return self.norm_out(x_BND) + (positions if places_BP is None else positions[places_BP])

    def embed_tokens(self, tokens: Tensor, hidden_BN: Tensor) -> Tensor:
        """(B, N, D): the tokens' embeddings, with the placeholder where hidden."""
        if tokens.is_floating_point():
            tokens = tokens.to(self.placeholder.dtype)
        x_BND = self.embed(tokens)
        return torch.where(hidden_BN[..., None], self.placeholder.to(x_BND.dtype), x_BND)

    def step(
        self,
        previous_B1: Tensor,
        ages_B: Tensor,
        grid: tuple[int, int],
        text: TextKeysValues,
        text_bias: Tensor | None,
        storage: Tensor,
    ) -> Tensor:
        """z (B, 1, D) of place `ages[b]` of a causal trunk from the token before it, (B, 1, C) or code (B, 1).

        `storage` (blocks, 2, B, H, N, d) holds the keys and values of earlier places, and is given those of this one.
        """
        length = int(ages_B.max()) + 1
        bias = padding_bias(torch.arange(length, device=ages_B.device)[None] <= ages_B[:, None])
        x_B1D = self.embed_tokens(previous_B1, ages_B[:, None] == 0) + self.positions(grid)[ages_B][:, None]
        x_B1D = self.norm_in(x_B1D)
        for i, (block, keys_values) in enumerate(zip(self.blocks, text, strict=True)):
            x_B1D = block(x_B1D, keys_values, text_bias, bias, Cache(storage[i], ages_B, length))
        return self.norm_out(x_B1D) + self.head_positions(grid)[ages_B][:, None]
