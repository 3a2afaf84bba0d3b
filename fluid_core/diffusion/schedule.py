"""Noise schedules.

eps and v: the cosine schedule of Nichol and Dhariwal (arXiv 2102.09672) in 1000 steps,
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
flow: the straight path x_t = (1 - t) x_0 + t eps with t in (0, 1).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """A discrete schedule over `steps_S` (timesteps of the 1000-step schedule, rising). All (S,), fp32 on the device, but for
    `steps` (int64) and `half_log_snr` = log(abar / (1 - abar)) / 2 (fp64), which solvers read as numbers: they stay on the CPU,
    so that no step waits for a GPU.

    `log_variance_low` and `_high` bound the learned variance: the posterior's (clipped at the first step) and beta.
    `mean_x0` and `mean_xt` weight x_0 and x_t in the posterior mean.
    """

    steps: Tensor
    half_log_snr: Tensor
    alpha_bar: Tensor
    alpha_bar_previous: Tensor
    betas: Tensor
    log_variance_low: Tensor
    log_variance_high: Tensor
    mean_x0: Tensor
    mean_xt: Tensor


def _cosine_alpha_bar() -> Tensor:
    """abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), as the product of 1 - beta with beta at most 0.999: fp64 (1000,)."""
    t = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999), dim=0)


@lru_cache(maxsize=64)
def _schedule(steps: tuple[int, ...], device: str) -> Schedule:
    index = torch.tensor(steps)
    bar = _cosine_alpha_bar()[index]
    previous = torch.cat((torch.ones(1, dtype=torch.float64), bar[:-1]))
    betas = 1 - bar / previous
    variance = betas * (1 - previous) / (1 - bar)
    clipped = variance.clone()
    # The first step's posterior variance is 0: its logarithm is taken from the second step's.
    clipped[0] = variance[1] if len(variance) > 1 else betas[0]
    mean_x0 = betas * previous.sqrt() / (1 - bar)
    mean_xt = (1 - previous) * (1 - betas).sqrt() / (1 - bar)
    values = (bar, previous, betas, clipped.log(), betas.log(), mean_x0, mean_xt)
    return Schedule(index, 0.5 * (bar / (1 - bar)).log(), *(value.float().to(device) for value in values))


def cosine_schedule(device: torch.device | str = "cpu") -> Schedule:
    """The 1000-step schedule of training."""
    return _schedule(tuple(range(TRAIN_STEPS)), str(device))


def respaced_schedule(num_steps: int, last: int, device: torch.device | str = "cpu", even_in: str = "time") -> Schedule:
    """`num_steps` of the timesteps 0..`last`, with betas that keep abar at them (section 4 of Nichol and Dhariwal).

    They are spread evenly in `time`, or in `log_snr` = log(abar / (1 - abar)) / 2 as multi-step solvers want them. `last`
    below 999 leaves out the end of the cosine schedule, where abar is 2e-9 and an error in eps is multiplied by hundreds
    (docs/generation.md).
    """
    if not 0 <= last < TRAIN_STEPS or even_in not in ("time", "log_snr"):
        raise ValueError(f"last must be in 0..{TRAIN_STEPS - 1} and even_in time or log_snr, got {last} and {even_in!r}")
    if not 1 <= num_steps <= last + 1:
        raise ValueError(f"head_steps must be between 1 and {last + 1}, got {num_steps}")
    if num_steps == 1:
        return _schedule((last,), str(device))
    if even_in == "time":
        return _schedule(tuple(round(i * last / (num_steps - 1)) for i in range(num_steps)), str(device))
    log_snr = cosine_schedule().half_log_snr[: last + 1]
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), num_steps, dtype=torch.float64)
    nearest = (log_snr[None] - wanted[:, None]).abs().argmin(dim=1).tolist()
    steps: list[int] = []
    for i, step in enumerate(nearest):  # where timesteps are too coarse, neighbours; never two of one
        steps.append(min(max(step, steps[-1] + 1 if steps else 0), last - (num_steps - 1 - i)))
    return _schedule(tuple(steps), str(device))
