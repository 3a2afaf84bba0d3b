"""Muon's step (Jordan et al., 2024): the nearest orthogonal matrix to an update, by Newton-Schulz iterations."""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn


def hidden_matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The matrices inside aligner, trunk and head blocks: what Muon updates. The rest is AdamW's."""
    inside = ((name, p) for name, p in model.named_parameters() if ".blocks." in name and name.endswith(".weight"))
    return [(name, p) for name, p in inside if dimensions(p) == 2]


def dimensions(parameter: nn.Parameter) -> int:
    """Of its own shape: a parameter that DeepSpeed's ZeRO-3 takes apart is flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


@cache
def polynomials(iterations: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of x -> a x + b x^3 + c x^5 for each Newton-Schulz iteration, together the best for singular values in [l, 1].

    Each is the minimax approximation of 1 on the interval that the one before leaves: greedy is optimal for a composition
    (Amsel et al., "The Polar Express", arXiv 2505.16932). l shrinks with the number of iterations, 0.003 for four: on the
    demo's momentum four of these come as near to the polar factor as five of Muon's original ones (docs/training.md).
    """
    low, high = 0.3 * 10 ** (-iterations / 2), 1.0
    out = []
    for _ in range(iterations):
        (a, b, c), error = _minimax_quintic(low, high)
        out.append((a, b, c))
        low, high = 1 - error, 1 + error
    return out


def _minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """The odd quintic nearest to 1 on [low, high] and its largest error, by Remez' exchange on four points."""
    x = np.linspace(low, high, 4)
    for _ in range(50):
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        roots = np.roots([5 * c, 0, 3 * b, 0, a])
        turning = np.sort(roots[(abs(roots.imag) < 1e-9) & (roots.real > low) & (roots.real < high)].real)
        if len(turning) != 2:  # the interval is a point for float64: any quintic that is 1 there will do
            break
        x = np.array([low, *turning, high])
    return (float(a), float(b), float(c)), abs(float(error))


def orthogonalise(matrices: Tensor, iterations: int) -> Tensor:
    """The nearest matrices with singular values near 1, for a batch (n, rows, cols): U V^T of each U S V^T.

    Works in the dtype it is given; bf16 is enough (Muon tolerates singular values between about 0.7 and 1.2).
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2).contiguous()
    # The Frobenius norm bounds the largest singular value; the margin absorbs bf16's rounding.
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7).to(x.dtype)
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        x = _through_gram(x, iterations)
    else:
        for a, b, c in polynomials(iterations):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.transpose(1, 2)


def muon_update(updates: Tensor, iterations: int) -> Tensor:
    """The orthogonalised updates (n, rows, cols) in AdamW's usual size, 0.2 sqrt(max(rows, cols)) (Liu et al., arXiv 2502.16982)."""
    return orthogonalise(updates, iterations) * (0.2 * max(updates.shape[1:]) ** 0.5)


def _through_gram(x: Tensor, iterations: int) -> Tensor:
    """The same iterations on G = x x^T alone: x is read twice in all, which halves the work for long matrices.

    An iteration is x <- P x with P = aI + bG + cG^2, so G <- P G P. G's smallest eigenvalues are squares of the singular
    values, which bf16 would lose: fp32 only.
    """
    gram = x @ x.transpose(1, 2)
    identity = torch.eye(gram.shape[1], device=x.device)
    product: Tensor | None = None
    for a, b, c in polynomials(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).add_(identity, alpha=a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    assert product is not None
    return product @ x
