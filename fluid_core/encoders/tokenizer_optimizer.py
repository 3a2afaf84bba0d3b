"""The tokenizer's optimisers: AdamW, or Muon for the hidden convolutions with AdamW for the rest.

Muon orthogonalises the update of a matrix; a convolution kernel (out, in, k, k) is taken as the matrix (out, in*k*k), the
map from a patch to the output channels. On a small convolutional tokenizer it needs about half of AdamW's steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fluid_core.config import TokenizerTrainingConfig

ENDS = ("conv_in", "conv_out", "quant_conv", "quantize")


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
        # Matrices over the kernels' own memory: torch's Muon takes 2-D tensors only.
        self.kernels: list[tuple[nn.Parameter, Tensor]] = [(p, p.detach().view(p.shape[0], -1)) for p in hidden]
        if self.kernels:
            matrices = [matrix for _, matrix in self.kernels]
            self.optimizers.append(
                torch.optim.Muon(
                    matrices, lr=config.muon_learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
                )
            )
            self.rates.append(config.muon_learning_rate)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, factor: float) -> None:
        """One update with each learning rate times `factor`, after clipping the gradient's norm to 1."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for kernel, matrix in self.kernels:
            assert kernel.grad is not None
            matrix.grad = kernel.grad.reshape(matrix.shape)
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
