"""Every solver against a Gaussian whose optimal predictions are known, and the bound on error amplification."""

import pytest
import torch

from fluid_core.diffusion.objectives import add_noise, head_outputs, token_loss
from fluid_core.diffusion.schedule import respaced_schedule
from fluid_core.diffusion.solvers import FIRST_TIMESTEP, SOLVERS, Predict, check_solver, denoise, solve
from fluid_core.generation.guidance import guide

MEAN = torch.tensor([0.8, -0.5, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.9]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
PAIRS = [(objective, solver) for objective, solvers in SOLVERS.items() for solver in solvers]


def optimal(objective: str, mean: torch.Tensor = MEAN, covariance: torch.Tensor = COVARIANCE) -> Predict:
    """E[target | x_t] of N(mean, covariance), the prediction of a perfectly trained head."""

    def predict(x: torch.Tensor, step: float) -> torch.Tensor:
        if objective == "flow":
            t = step / 1000
            alpha, sigma = 1 - t, t
        else:
            bar = respaced_schedule(1, int(step)).alpha_bar.double()[0]
            alpha, sigma = bar.sqrt().item(), (1 - bar).sqrt().item()
        noisy_covariance = alpha**2 * covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
        deviation = torch.linalg.solve(noisy_covariance, (x.double() - alpha * mean).T).T
        eps = sigma * deviation
        x0 = mean + alpha * deviation @ covariance
        if objective == "flow":
            return (eps - x0).float()
        if objective == "v":
            return (alpha * eps - sigma * x0).float()
        return torch.cat((eps, -torch.ones_like(eps)), dim=-1).float()  # the variance's lower bound: the posterior's

    return predict


def sample(
    objective: str, solver: str, steps: int, count: int = 20_000, predict: Predict | None = None, temperature: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def noise(i: int) -> torch.Tensor:
        return torch.randn(count, 3, generator=generator)

    return solve(objective, solver, predict or optimal(objective), noise(0), steps, temperature, noise)


@pytest.mark.parametrize("objective,solver", PAIRS)
def test_recovers_mean_and_covariance_of_a_gaussian(objective: str, solver: str) -> None:
    steps = 250 if solver in ("ddpm", "ddim", "euler") else 50
    x = sample(objective, solver, steps).double()
    # Monte-Carlo errors of 20,000 samples are 0.007; the rest is the solver's and the start at timestep 980.
    assert torch.allclose(x.mean(0), MEAN, atol=0.04), x.mean(0)
    assert torch.allclose(torch.cov(x.T), COVARIANCE, atol=0.04), torch.cov(x.T)
    few = sample(objective, solver, 6).double()
    assert torch.allclose(few.mean(0), MEAN, atol=0.04), "the mean is exact in any number of steps"


@pytest.mark.parametrize("objective,first,second", [("eps", "ddim", "dpm2"), ("v", "ddim", "dpm2"), ("flow", "euler", "heun")])
def test_second_order_solvers_need_far_fewer_steps(objective: str, first: str, second: str) -> None:
    exact = sample(objective, second, 400, count=500)
    error = {s: (sample(objective, s, 12, count=500) - exact).square().mean().sqrt() for s in (first, second)}
    assert error[second] < 0.5 * error[first], error
    finer = (sample(objective, second, 48, count=500) - exact).square().mean().sqrt()
    assert finer < 0.2 * error[second], "a quarter of the step: much less than a quarter of the error"


@pytest.mark.parametrize("objective,solver", PAIRS)
def test_solvers_work_with_guidance(objective: str, solver: str) -> None:
    """Guidance between two Gaussians of one covariance moves the mean to u + w (c - u), for every solver."""
    conditional, unconditional = optimal(objective), optimal(objective, mean=torch.zeros(3, dtype=torch.float64))
    weight = torch.full((4000, 1), 1.8)

    def predict(x: torch.Tensor, step: float) -> torch.Tensor:
        return guide(conditional(x, step), unconditional(x, step), weight, 3)

    x = sample(objective, solver, 200 if solver in ("ddpm", "ddim", "euler") else 60, count=4000, predict=predict)
    assert torch.allclose(x.double().mean(0), 1.8 * MEAN, atol=0.08), x.mean(0)


def test_temperature_scales_the_noise() -> None:
    for objective, solver in (("eps", "ddpm"), ("eps", "ddim"), ("flow", "heun")):
        warm, cool = (sample(objective, solver, 50, count=4000, temperature=t).std(0).mean() for t in (1.0, 0.7))
        assert cool < 0.9 * warm, solver


def first_step_amplification(steps: int, last: int) -> float:
    """d x_{t-1} / d eps of the first DDPM step."""
    schedule = respaced_schedule(steps, last)
    x, i = torch.zeros(1, 1), steps - 1

    def step(eps: float) -> torch.Tensor:
        x0, _ = denoise("eps", torch.full((1, 2), eps), x, schedule.alpha_bar[i])
        return schedule.mean_x0[i] * x0 + schedule.mean_xt[i] * x

    return abs(float(step(1.0) - step(0.0)))


def test_the_clipped_start_bounds_the_amplification_of_errors() -> None:
    assert FIRST_TIMESTEP == 980
    unclipped = {steps: first_step_amplification(steps, 999) for steps in (100, 50, 25, 10, 5)}
    assert abs(unclipped[100] - 316) < 10 and unclipped[10] > 3000
    for steps in (250, 100, 50, 25, 10, 5):
        assert first_step_amplification(steps, FIRST_TIMESTEP) < 15, steps
    assert first_step_amplification(100, FIRST_TIMESTEP) < 1
    for steps in (4, 3, 2, 1):  # one step alone divides by the signal that is left at 980, 3%
        assert first_step_amplification(steps, FIRST_TIMESTEP) < 34 < 0.01 * first_step_amplification(steps, 999), steps


def test_few_steps_are_stable_with_an_imperfect_head() -> None:
    """A head with 2% error in eps: from 999 the samples would be in the hundreds, from 980 they stay a Gaussian's."""
    perfect = optimal("eps")
    generator = torch.Generator().manual_seed(1)

    def rough(x: torch.Tensor, step: float) -> torch.Tensor:
        out = perfect(x, step)
        return out + 0.02 * torch.randn(out.shape, generator=generator)

    assert sample("eps", "ddim", 10, count=2000, predict=rough).abs().max() < 8


def test_wrong_solvers_and_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="solver 'heun' does not go with objective 'eps': use one of ddpm, ddim, dpm2"):
        check_solver("eps", "heun", 10)
    with pytest.raises(ValueError, match="solver 'plms' is unknown for objective 'flow': use one of heun, euler"):
        check_solver("flow", "plms", 10)
    with pytest.raises(ValueError, match="head_steps must be between 1 and 981, got 1000"):
        check_solver("eps", "ddpm", 1000)
    with pytest.raises(ValueError, match=r"noise must be float32 \(tokens, channels\), got torch.float64 \(3,\)"):
        solve("flow", "euler", optimal("flow"), MEAN, 4, 1.0, lambda i: MEAN)
    with pytest.raises(ValueError, match=r"last must be in 0\.\.999 and even_in time or log_snr, got 1000 and 'time'"):
        respaced_schedule(10, 1000)
    with pytest.raises(ValueError, match="got 980 and 'snr'"):
        respaced_schedule(10, 980, even_in="snr")
    with pytest.raises(ValueError, match="head_steps must be at least 1, got 0"):
        check_solver("flow", "euler", 0)


@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.0])
def test_ddpm_draws_with_the_variance_that_the_head_learned(logit: float) -> None:
    """Between its bounds on a log scale. The head says x_0 = 0, so that one step's noise is all that is added."""
    schedule = respaced_schedule(2, FIRST_TIMESTEP)
    seen: list[torch.Tensor] = []

    def predict(x: torch.Tensor, step: float) -> torch.Tensor:
        seen.append(x)
        bar = schedule.alpha_bar[2 - len(seen)]
        return torch.cat((x / (1 - bar).sqrt(), torch.full_like(x, logit)), dim=-1)

    start, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    solve("eps", "ddpm", predict, start, 2, 1.0, lambda _: noise)
    deviation = (seen[1] - schedule.mean_xt[1] * start) / noise
    share = (logit + 1) / 2
    expected = share * schedule.log_variance_high[1] + (1 - share) * schedule.log_variance_low[1]
    assert torch.allclose(2 * deviation.log(), expected.expand_as(deviation), atol=1e-3)


def test_an_unknown_objective_is_named() -> None:
    x, times = torch.zeros(2, 3), torch.full((2,), 0.5)
    for call in (
        lambda: add_noise("epsilon", x, x, times),
        lambda: token_loss("epsilon", x, x, x, x, times),
        lambda: head_outputs("epsilon", 3),
        lambda: solve("epsilon", "ddpm", lambda x, _: x, x, 2, 1.0, lambda _: x),
    ):
        with pytest.raises(ValueError, match="unknown objective 'epsilon'; one of eps, v, flow"):
            call()
