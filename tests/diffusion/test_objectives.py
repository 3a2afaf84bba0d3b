"""Schedules and losses against their formulas."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fluid_core.diffusion.objectives import add_noise, discrete_steps, head_outputs, token_loss, variational_bound
from fluid_core.diffusion.schedule import cosine_schedule, respaced_schedule


def test_cosine_schedule_is_nichols() -> None:
    bar = cosine_schedule().alpha_bar.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    formula = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(bar[:998], formula[:998], rtol=1e-4)
    assert abs(cosine_schedule().betas.max() - 0.999) < 1e-6
    assert 2e-9 < bar[-1] < 3e-9


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_respacing_keeps_alpha_bar(steps: int) -> None:
    full, spaced = cosine_schedule(), respaced_schedule(steps, last=980)
    assert len(spaced.steps) == steps and spaced.steps[-1] == 980 and (steps == 1 or spaced.steps[0] == 0)
    assert torch.equal(spaced.alpha_bar, full.alpha_bar[spaced.steps])
    assert torch.allclose(torch.cumprod(1 - spaced.betas.double(), 0), spaced.alpha_bar.double(), rtol=1e-4)
    assert torch.equal(respaced_schedule(1000, last=999).betas, full.betas)
    even = respaced_schedule(steps, last=980, even_in="log_snr")
    assert torch.equal(even.steps, even.steps.unique()) and len(even.steps) == steps and even.steps[-1] == 980
    if steps == 10:
        log_snr = 0.5 * (even.alpha_bar / (1 - even.alpha_bar)).log()
        assert torch.allclose(log_snr.diff(), log_snr.diff().mean(), rtol=0.15)
    with pytest.raises(ValueError, match="head_steps must be between 1 and 981, got 982"):
        respaced_schedule(982, last=980)


def test_noisy_tokens() -> None:
    x0, noise = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    times = torch.rand(3, 5)
    x_t, steps = add_noise("flow", x0, noise, times)
    assert torch.allclose(x_t, (1 - times[..., None]) * x0 + times[..., None] * noise, atol=1e-6)
    assert torch.allclose(steps, 1000 * times)
    x_t, steps = add_noise("eps", x0, noise, times)
    bar = cosine_schedule().alpha_bar[steps.long()][..., None]
    assert torch.allclose(x_t, bar.sqrt() * x0 + (1 - bar).sqrt() * noise) and torch.equal(steps, (times * 1000).floor())
    assert discrete_steps(torch.tensor([1e-9, 1 - 1e-9])).tolist() == [0, 999]


@pytest.mark.parametrize("objective", ["v", "flow"])
def test_perfect_predictions_have_no_loss(objective: str) -> None:
    x0, noise, times = torch.randn(50, 4), torch.randn(50, 4), torch.rand(50)
    x_t, steps = add_noise(objective, x0, noise, times)
    if objective == "flow":
        perfect = noise - x0
    else:
        bar = cosine_schedule().alpha_bar[steps.long()][:, None]
        perfect = bar.sqrt() * noise - (1 - bar).sqrt() * x0
    assert token_loss(objective, perfect, x0, noise, x_t, times).abs().max() < 1e-10
    assert torch.allclose(token_loss(objective, perfect + 2, x0, noise, x_t, times), torch.full((50,), 4.0), rtol=1e-5)


def test_variational_bound_is_the_kl_between_the_two_gaussians() -> None:
    """Against torch.distributions, with means and variances computed from the definitions in double precision."""
    schedule = cosine_schedule()
    steps = torch.tensor([1, 5, 100, 500, 900, 990])
    x0, noise, eps, logits = (torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
    bar = schedule.alpha_bar[steps].double()[:, None]
    previous = schedule.alpha_bar[steps - 1].double()[:, None]
    beta = 1 - bar / previous
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    posterior_variance = beta * (1 - previous) / (1 - bar)

    def posterior_mean(x0: torch.Tensor) -> torch.Tensor:
        return (beta * previous.sqrt() * x0 + (1 - previous) * (1 - beta).sqrt() * x_t) / (1 - bar)

    predicted_x0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
    fraction = (logits.double() + 1) / 2
    log_variance = fraction * beta.log() + (1 - fraction) * posterior_variance.log()
    truth = Normal(posterior_mean(x0.double()), posterior_variance.sqrt())
    model = Normal(posterior_mean(predicted_x0), (0.5 * log_variance).exp())
    expected = kl_divergence(truth, model).mean(-1) / math.log(2)
    actual = variational_bound(schedule, eps, logits, x0, x_t.float(), steps)
    assert torch.allclose(actual.double(), expected, rtol=2e-2), (actual, expected)


def test_variational_bound_at_step_zero_is_a_binned_likelihood() -> None:
    """-log2 P(x_0's bin of width 2/255), by numerical integration of the normal density."""
    schedule, steps = cosine_schedule(), torch.zeros(64, dtype=torch.int64)
    x0 = torch.rand(64, 1) * 1.8 - 0.9
    bar = schedule.alpha_bar[0]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * torch.randn(64, 1)
    eps, logits = torch.randn(64, 1), torch.randn(64, 1)
    mean = ((x_t - (1 - bar).sqrt() * eps) / bar.sqrt()).double()
    fraction = (logits + 1) / 2
    log_variance = fraction * schedule.log_variance_high[0] + (1 - fraction) * schedule.log_variance_low[0]
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64) / 255
    density = Normal(mean, (0.5 * log_variance).exp().double()).log_prob(x0.double() + grid).exp()
    expected = -torch.trapezoid(density, grid, dim=-1).log2()
    actual = variational_bound(schedule, eps, logits, x0, x_t, steps).double()
    likely = expected < 10  # the reference's tanh form of the normal distribution is not accurate far in the tail
    assert likely.sum() > 40 and torch.allclose(actual[likely], expected[likely], rtol=0.05, atol=0.02)


def test_variational_bound_trains_the_variance_alone() -> None:
    x0, noise, times = torch.randn(64, 4), torch.randn(64, 4), torch.rand(64)
    x_t, _ = add_noise("eps", x0, noise, times)
    prediction = torch.randn(64, 8, requires_grad=True)
    token_loss("eps", prediction, x0, noise, x_t, times).sum().backward()
    assert prediction.grad is not None
    assert torch.allclose(prediction.grad[:, :4], 2 * (prediction[:, :4].detach() - noise) / 4, rtol=1e-4)
    assert bool(prediction.grad[:, 4:].any())
    assert head_outputs("eps", 4) == 8 and head_outputs("v", 4) == head_outputs("flow", 4) == 4
