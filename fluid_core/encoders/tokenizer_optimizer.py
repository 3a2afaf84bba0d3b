"""The tokenizer's optimisers: AdamW, or Muon for the hidden convolutions with AdamW for the rest.

Muon orthogonalises the update of a matrix; a convolution kernel (out, in, k, k) is taken as the matrix (out, in*k*k), the
map from a patch to the output channels. On a small convolutional tokenizer it needs about half of AdamW's steps.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from fluid_core.config import TokenizerTrainingConfig
from fluid_core.muon import muon_update
from fluid_core.precision import computes_bf16

ENDS = ("conv_in", "conv_out", "quant_conv", "quantize")


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolution kernels. Not torch's own, which orthogonalises in bf16: on most CPUs that is emulated."""

    def __init__(self, kernels: list[nn.Parameter], lr: float, momentum: float = 0.95, iterations: int = 4):
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                by_shape[(p.shape[0], p[0].numel())].append(p)
            for shape, kernels in by_shape.items():
                self._step(kernels, shape, group)

    def _step(self, kernels: list[nn.Parameter], shape: tuple[int, int], group: dict[str, Any]) -> None:
        updates = []
        for p in kernels:
            assert p.grad is not None
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(momentum, group["momentum"]).reshape(shape))
        dtype = torch.bfloat16 if computes_bf16(kernels[0].device) else torch.float32
        directions = muon_update(torch.stack(updates).to(dtype), group["iterations"])
        for p, direction in zip(kernels, directions, strict=True):
            p.sub_(direction.reshape(p.shape), alpha=group["lr"])


class TokenizerOptimizer:
    """One `step`, `zero_grad` and `state_dict` over both optimisers."""

    def __init__(self, model: nn.Module, config: TokenizerTrainingConfig):
        hidden = [] if config.optimizer == "adamw" else [p for name, p in model.named_parameters() if _is_hidden(name, p)]
        inside = {id(p) for p in hidden}
        self.parameters = list(model.parameters())
        rest = [p for p in self.parameters if id(p) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        ]
        self.rates = [config.learning_rate]
        if hidden:
            self.optimizers.append(KernelMuon(hidden, lr=config.muon_learning_rate))
            self.rates.append(config.muon_learning_rate)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, factor: float) -> None:
        """One update with each learning rate times `factor`, after clipping the gradient's norm to 1."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 4 and not any(end in name for end in ENDS)
