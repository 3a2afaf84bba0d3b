"""From noise to a token: the solvers of the head's diffusion or flow.

ddpm: ancestral sampling on a respaced schedule (MAR). ddim: its deterministic form (arXiv 2010.02502). dpm2: DPM-Solver++(2M)
(arXiv 2211.01095), second order. euler, heun: first and second order for the straight path of flow matching.

All of them ask for predictions through one function, with guidance inside, so each works with guidance.

Shapes: P tokens, C channels. x and noise are fp32 (P, C).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluid_core.config.deploy import SOLVERS
from fluid_core.diffusion.objectives import check_objective, learned_log_variance
from fluid_core.diffusion.schedule import TRAIN_STEPS, Schedule, respaced_schedule

FIRST_TIMESTEP = 980
"""Where eps and v solvers start: from 999 the first of 100 steps would multiply an error in eps by 316, of 10 by 3493."""

Predict = Callable[[Tensor, float], Tensor]
"""(x (P, C), timestep on the scale 0..1000) -> the head's guided output (P, C or 2C)."""
StepNoise = Callable[[int], Tensor]
"""(index of the head step) -> fp32 normal noise (P, C)."""


def check_solver(objective: str, solver: str, head_steps: int) -> None:
    """Raise ValueError for a solver that does not go with the objective, or an impossible number of steps."""
    check_objective(objective)
    if solver not in SOLVERS[objective]:
        known = solver in {name for names in SOLVERS.values() for name in names}
        text = "does not go with" if known else "is unknown for"
        raise ValueError(f"solver {solver!r} {text} objective {objective!r}: use one of {', '.join(SOLVERS[objective])}")
    if head_steps < 1 or (objective != "flow" and head_steps > FIRST_TIMESTEP + 1):
        limit = "" if objective == "flow" else f" and {FIRST_TIMESTEP + 1}"
        raise ValueError(f"head_steps must be {'at least 1' if not limit else 'between 1' + limit}, got {head_steps}")


def solve(
    objective: str,
    solver: str,
    predict: Predict,
    noise: Tensor,
    head_steps: int,
    temperature: Tensor | float,
    step_noise: StepNoise,
) -> Tensor:
    """One token each from `noise`: fp32 (P, C).

    `temperature` (a number or (P, 1)) multiplies the noise: that of every step with ddpm (MAR), and the initial noise with
    the deterministic solvers.
    """
    check_solver(objective, solver, head_steps)
    if noise.ndim != 2 or noise.dtype != torch.float32:
        raise ValueError(f"noise must be float32 (tokens, channels), got {noise.dtype} {tuple(noise.shape)}")
    if objective == "flow":
        return _flow(predict, noise * temperature, head_steps, second_order=solver == "heun")
    even_in = "log_snr" if solver == "dpm2" else "time"
    schedule = respaced_schedule(head_steps, FIRST_TIMESTEP, noise.device, even_in)
    if solver == "ddpm":
        return _ddpm(objective, schedule, predict, noise, temperature, step_noise)
    if solver == "ddim":
        return _ddim(objective, schedule, predict, noise * temperature)
    return _dpm2(objective, schedule, predict, noise * temperature)


def denoise(objective: str, prediction: Tensor, x: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, eps) from an eps or v prediction at abar = `bar`."""
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    if objective == "v":
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction
    eps = prediction[..., : x.shape[-1]]
    return (x - sigma * eps) / alpha, eps


def _ddpm(
    objective: str, schedule: Schedule, predict: Predict, x: Tensor, temperature: Tensor | float, step_noise: StepNoise
) -> Tensor:
    """x_{t-1} = posterior mean(x_0, x_t) + temperature * sigma_t * noise; no noise in the last step."""
    C = x.shape[-1]
    for i in range(len(schedule.steps) - 1, -1, -1):
        prediction = predict(x, float(schedule.steps[i]))
        x0, _ = denoise(objective, prediction, x, schedule.alpha_bar[i])
        mean = schedule.mean_x0[i] * x0 + schedule.mean_xt[i] * x
        if i == 0:
            return mean
        if objective == "eps":
            log_variance = learned_log_variance(schedule, prediction[..., C:], torch.full((1,), i, device=x.device))
        else:
            log_variance = schedule.log_variance_low[i]
        x = mean + temperature * (0.5 * log_variance).exp() * step_noise(i)
    raise AssertionError("a schedule has at least one step")


def _ddim(objective: str, schedule: Schedule, predict: Predict, x: Tensor) -> Tensor:
    """x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) eps."""
    for i in range(len(schedule.steps) - 1, -1, -1):
        x0, eps = denoise(objective, predict(x, float(schedule.steps[i])), x, schedule.alpha_bar[i])
        previous = schedule.alpha_bar_previous[i]
        x = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
    return x


def _dpm2(objective: str, schedule: Schedule, predict: Predict, x: Tensor) -> Tensor:
    """x_{t-1} = (s_{t-1} / s_t) x_t + a_{t-1} (1 - e^{-h}) D,   D = x_0 + h / (2 h_before) (x_0 - x_0 of the step before),

    with a = sqrt(abar), s = sqrt(1 - abar) and h the step in log(a / s). The last step, to s = 0, is x_0 itself.
    """
    x0_before, h_before = x, 0.0
    for i in range(len(schedule.steps) - 1, -1, -1):
        x0, _ = denoise(objective, predict(x, float(schedule.steps[i])), x, schedule.alpha_bar[i])
        if i == 0:
            return x0
        h = float(schedule.half_log_snr[i - 1] - schedule.half_log_snr[i])
        direction = x0 if h_before == 0.0 else x0 + h / (2 * h_before) * (x0 - x0_before)
        sigma_ratio = ((1 - schedule.alpha_bar[i - 1]) / (1 - schedule.alpha_bar[i])).sqrt()
        x = sigma_ratio * x + schedule.alpha_bar[i - 1].sqrt() * (1.0 - math.exp(-h)) * direction
        x0_before, h_before = x0, h
    raise AssertionError("a schedule has at least one step")


def _flow(predict: Predict, x: Tensor, head_steps: int, second_order: bool) -> Tensor:
    """dx/dt = u(x, t) from t = 1 to 0 in equal steps. Heun's last step is Euler's: u at t = 0 was hardly trained."""
    dt = 1.0 / head_steps
    for i in range(head_steps):
        t = 1.0 - i * dt
        velocity = predict(x, t * TRAIN_STEPS)
        if second_order and i < head_steps - 1:
            velocity = 0.5 * (velocity + predict(x - dt * velocity, (t - dt) * TRAIN_STEPS))
        x = x - dt * velocity
    return x
