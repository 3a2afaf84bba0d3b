"""What the head learns: noise (eps, with a learned variance), v, or the velocity of a straight path (flow).

Each objective says how to make a noisy token, what loss a prediction has, and how to read x_0 and eps off a prediction.

Shapes: ... any leading, C channels; x_0, noise, x_t are fp32 (..., C); time is fp32 (...) in (0, 1), 1 = pure noise.
"""

import math

import torch
from torch import Tensor

from fluid_core.diffusion.schedule import TRAIN_STEPS, Schedule, cosine_schedule

OBJECTIVES = ("eps", "v", "flow")


def check_objective(objective: str) -> None:
    """Raises ValueError for a name that is none of them."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; one of {', '.join(OBJECTIVES)}")


def discrete_steps(times: Tensor) -> Tensor:
    """Time in (0, 1) to the 1000 timesteps of the cosine schedule: int64."""
    return (times * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)


def add_noise(objective: str, x0: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, timestep for the head on the scale 0..1000)."""
    check_objective(objective)
    if objective == "flow":
        t = times[..., None]
        return torch.lerp(x0, noise, t), times * TRAIN_STEPS
    steps = discrete_steps(times)
    bar = cosine_schedule(x0.device).alpha_bar[steps][..., None]
    return bar.sqrt() * x0 + (1 - bar).sqrt() * noise, steps.float()


def head_outputs(objective: str, channels: int) -> int:
    """Channels that the head predicts: eps carries one variance logit for each channel."""
    check_objective(objective)
    return 2 * channels if objective == "eps" else channels


def token_loss(objective: str, prediction: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
    """The loss of each token and timestep, mean over channels: fp32 (...).

    eps: |eps - eps_theta|^2 + VLB, exactly MAR's (Improved DDPM with LEARNED_RANGE). v: |v - v_theta|^2 with
    v = sqrt(abar) eps - sqrt(1 - abar) x_0. flow: |(eps - x_0) - u_theta|^2.
    """
    check_objective(objective)
    if objective == "flow":
        return (prediction - (noise - x0)).square().mean(-1)
    schedule, steps = cosine_schedule(x0.device), discrete_steps(times)
    if objective == "v":
        bar = schedule.alpha_bar[steps][..., None]
        return (prediction - (bar.sqrt() * noise - (1 - bar).sqrt() * x0)).square().mean(-1)
    eps, logits = prediction.chunk(2, dim=-1)
    return (eps - noise).square().mean(-1) + variational_bound(schedule, eps.detach(), logits, x0, x_t, steps)


def learned_log_variance(schedule: Schedule, logits: Tensor, steps: Tensor) -> Tensor:
    """log variance between its two bounds: f log(beta) + (1 - f) log(posterior variance), f = (logits + 1) / 2."""
    fraction = (logits + 1) / 2
    low, high = schedule.log_variance_low[steps][..., None], schedule.log_variance_high[steps][..., None]
    return torch.lerp(low, high, fraction)


def variational_bound(schedule: Schedule, eps: Tensor, logits: Tensor, x0: Tensor, x_t: Tensor, steps: Tensor) -> Tensor:
    """One term of the variational bound in bits per channel: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0
    the negative log-likelihood of x_0 in bins of 2/255. `eps` is given detached: the bound trains the variance alone."""
    coefficient_0, coefficient_t = schedule.mean_x0[steps][..., None], schedule.mean_xt[steps][..., None]
    bar = schedule.alpha_bar[steps][..., None]
    predicted_x0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
    true_mean = coefficient_0 * x0 + coefficient_t * x_t
    mean = coefficient_0 * predicted_x0 + coefficient_t * x_t
    true_log_variance = schedule.log_variance_low[steps][..., None]
    log_variance = learned_log_variance(schedule, logits, steps)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1.0
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = _discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(steps == 0, -likelihood.mean(-1), kl.mean(-1)) / math.log(2.0)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the normal's mass in the bin [x - 1/255, x + 1/255], whose first and last bins reach to infinity."""

    def cdf(value: Tensor) -> Tensor:  # the tanh approximation of the reference implementation
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    inverse = (-log_scale).exp()
    upper, lower = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()
