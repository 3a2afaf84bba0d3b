"""The heads: what the model says about one token given its condition z.

DiffusionHead (tokens: continuous) is MAR's small MLP with adaptive layer norm; CodeHead (tokens: discrete) a softmax.

Shapes: K tokens, R timesteps for each, D trunk width, W head width, C token channels, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluid_core.model.layers import Linear
from fluid_core.model.positions import sinusoids

TIME_CHANNELS = 256


class HeadLinear(Linear):
    """Computes in its input's dtype whatever its weights' dtype: the head's precision is its own, not the engine's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class TimeLinear(HeadLinear):
    """Starts as N(0, 0.02) (MAR's timestep embedding)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Module):
    """A linear layer that starts at zero. Not an nn.Linear, so that an `apply` over all of those leaves it at zero."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class HeadBlock(nn.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), with (shift, scale, gate) from SiLU(y); MLP of ratio 1."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = ZeroLinear(width, 3 * width)
        self.inner, self.outer = HeadLinear(width, width), HeadLinear(width, width)

    def forward(self, x: Tensor, active_y: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(active_y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.outer(F.silu(self.inner(_modulated_norm(x, shift, scale)))))


class DiffusionHead(nn.Module):
    """Predicts noise (eps; with the variance's logits), v, or velocity (flow) from a noisy token, its timestep and z.

    Paper section 3; the layout is MAR's (`diffloss`): input and condition projections, residual blocks, final layer.
    All arithmetic is in fp32, under any autocast and with weights of any dtype; `as_trunk` (not for eps): in bf16 where the
    trunk is, that is under bf16 autocast or with bf16 weights.
    """

    def __init__(self, trunk_width: int, width: int, blocks: int, channels: int, outputs: int, as_trunk: bool):
        super().__init__()
        self.as_trunk = as_trunk
        self.time_in, self.time_out = TimeLinear(TIME_CHANNELS, width), TimeLinear(width, width)
        self.input, self.condition = HeadLinear(channels, width), HeadLinear(trunk_width, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(blocks))
        self.modulation, self.output = ZeroLinear(width, 2 * width), ZeroLinear(width, outputs)

    def embed_condition(self, z_KD: Tensor) -> Tensor:
        """z's projection (K, W): once for each token, whatever the number of timesteps."""
        dtype = self._dtype(z_KD.device)
        with torch.autocast(z_KD.device.type, enabled=False):
            return self.condition(z_KD.to(dtype))

    def forward(self, noisy_RKC: Tensor, steps_RK: Tensor, condition_KW: Tensor) -> Tensor:
        """fp32 (R, K, outputs). `steps`: timesteps on the scale 0..1000, shape (R, K) or (R, 1)."""
        dtype = self._dtype(noisy_RKC.device)
        with torch.autocast(noisy_RKC.device.type, enabled=False):
            time = sinusoids(steps_RK, TIME_CHANNELS).to(dtype)
            active_y = F.silu(self.time_out(F.silu(self.time_in(time))) + condition_KW)
            x = self.input(noisy_RKC.to(dtype))
            for block in self.blocks:
                x = block(x, active_y)
            shift, scale = self.modulation(active_y).chunk(2, dim=-1)
            return self.output(_modulated_norm(x, shift, scale)).float()

    def _dtype(self, device: torch.device) -> torch.dtype:
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
        low = self.as_trunk and (autocast or self.output.weight.dtype == torch.bfloat16)
        return torch.bfloat16 if low else torch.float32


class CodeBook(nn.Module):
    """The embedding of discrete tokens, tied to the output layer of their softmax."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.codes = codes
        self.weight = nn.Parameter(torch.empty(codes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, values: Tensor, logits: bool = False) -> Tensor:
        """Codes (int64, any shape) to embeddings (..., D); or with `logits` features (..., D) to fp32 scores (..., V)."""
        return F.linear(values, self.weight).float() if logits else F.embedding(values, self.weight)


class CodeHead(nn.Module):
    """z -> features that are compared with every code's embedding (as in BERT: linear, GELU, norm, then the tied layer)."""

    def __init__(self, trunk_width: int):
        super().__init__()
        self.dense = Linear(trunk_width, trunk_width)
        self.norm = nn.LayerNorm(trunk_width, eps=1e-6)

    def forward(self, z_KD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(z_KD)))
