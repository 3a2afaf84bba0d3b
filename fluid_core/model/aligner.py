"""The text aligner: trainable transformer blocks on top of the frozen T5 encoder (paper, figure 3 and table 3).

Shapes: B batch, L text tokens, T valid ones among all B * L, E width of the text encoder, D model width.
"""

from torch import Tensor, nn

from fluid_core.model.layers import MLP, LayerNorm, Linear, Packing, SelfAttention, padding_bias
from fluid_core.model.positions import TextPositions


class AlignerBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = LayerNorm(width), SelfAttention(width, heads)
        self.norm2, self.mlp = LayerNorm(width), MLP(width)

    def forward(self, x_TD: Tensor, bias: Tensor, packing: Packing) -> Tensor:
        x_TD = x_TD + self.attention(self.norm1(x_TD), bias, packing=packing)
        return x_TD + self.mlp(self.norm2(x_TD))


class TextAligner(nn.Module):
    """T5 states to the model's width. It has positions of its own: T5's relative ones do not reach its output's users."""

    def __init__(self, text_width: int, max_tokens: int, width: int, heads: int, blocks: int):
        super().__init__()
        self.project = Linear(text_width, width)
        self.positions = TextPositions(max_tokens, width)
        self.blocks = nn.ModuleList(AlignerBlock(width, heads) for _ in range(blocks))
        self.norm = LayerNorm(width)

    def forward(self, text_BLE: Tensor, mask_BL: Tensor, ragged: bool = False) -> tuple[Tensor, Packing]:
        """The aligned text's valid places (T, D), and where they are. Padding (mask False) is not computed."""
        packing = Packing(mask_BL, ragged)
        text_TE = packing.pack(text_BLE).to(self.project.weight.dtype)
        L = text_BLE.shape[1]
        x_TD = self.project(text_TE) + self.positions(L)[packing.places_T % L]
        bias = padding_bias(mask_BL)
        for block in self.blocks:
            x_TD = block(x_TD, bias, packing)
        return self.norm(x_TD), packing
