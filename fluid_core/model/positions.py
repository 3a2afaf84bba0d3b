"""Learned positions that start as sinusoids, so that neighbours are similar from the first step.

Shapes: h w grid, L text tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCALE = 0.7  # root-mean-square about 0.5: in the range of what is added to them


def sinusoids(values: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """cos and sin of `values` (any shape) at width/2 frequencies from 1 to 1/max_period: fp32 (..., width)."""
    half = width // 2
    frequencies = max_period ** (-torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values.float()[..., None] * frequencies
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, width - 2 * half))


class GridPositions(nn.Module):
    """A learned vector for each place of a grid x grid field; other grids get it by bicubic interpolation."""

    def __init__(self, grid: int, width: int):
        super().__init__()
        self.grid, self.width = grid, width
        self.table = nn.Parameter(torch.empty(grid * grid, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        axis = torch.arange(self.grid, dtype=torch.float32, device=self.table.device)
        half = self.width // 2
        rows = sinusoids(axis, half)[:, None].expand(-1, self.grid, -1)
        columns = sinusoids(axis, self.width - half)[None].expand(self.grid, -1, -1)
        with torch.no_grad():
            self.table.copy_(_SCALE * torch.cat((rows, columns), dim=-1).flatten(0, 1))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(h * w, D), row-major."""
        if grid == (self.grid, self.grid):
            return self.table
        field_1Dhw = self.table.float().reshape(1, self.grid, self.grid, self.width).permute(0, 3, 1, 2)
        resized = F.interpolate(field_1Dhw, size=grid, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.to(self.table.dtype)


class TextPositions(nn.Module):
    """A learned vector for each place of a caption."""

    def __init__(self, max_tokens: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_tokens, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        places = torch.arange(self.table.shape[0], device=self.table.device)
        with torch.no_grad():
            self.table.copy_(_SCALE * sinusoids(places, self.table.shape[1]))

    def forward(self, length: int) -> Tensor:
        """(L, D)."""
        return self.table[:length]
