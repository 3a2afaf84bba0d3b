"""Muon's orthogonalisation, the schedule, and the health policy."""

import math
import platform
from pathlib import Path

import pytest
import torch
from tiny_fluid import padded, texts, tiny_model

from fluid_core.config import TrainingConfig
from fluid_core.model.draws import draw_training
from fluid_core.muon import orthogonalise, polynomials
from fluid_core.precision import uses_bf16
from fluid_core.training.ema import ema_decay
from fluid_core.training.health import HealthPolicy
from fluid_core.training.metrics import BinnedLoss, MetricsFile
from fluid_core.training.schedule import learning_rate_factor


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    result = orthogonalise(matrices, 6)
    assert result.shape == matrices.shape
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    well = s > 0.05 * s[:, :1]
    values = torch.linalg.svdvals(result)
    assert bool((values[well] > 0.85).all()) and bool((values < 1.15).all())
    # The same singular vectors: the result is the polar factor.
    assert float((result - u @ vh).norm() / (u @ vh).norm()) < 0.1
    in_bf16 = orthogonalise(matrices.bfloat16(), 5)
    assert float((in_bf16.float() - u @ vh).norm() / (u @ vh).norm()) < 0.2
    assert torch.isfinite(orthogonalise(torch.zeros(1, 4, 8), 5)).all()


def test_the_gram_matrix_gives_the_same_iterations() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 64)
    by_hand = matrices / (matrices.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in polynomials(4):
        gram = by_hand @ by_hand.mT
        by_hand = a * by_hand + (b * gram + c * gram @ gram) @ by_hand
    assert torch.allclose(orthogonalise(matrices, 4), by_hand, atol=1e-4)


def test_bf16_is_used_where_the_device_computes_it() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert uses_bf16("auto", gpu) and uses_bf16("bf16", cpu) and not uses_bf16("fp32", gpu)
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and platform.machine() == "x86_64":
        words = flags.read_text().split()
        assert uses_bf16("auto", cpu) == ("avx512_bf16" in words or "amx_bf16" in words)


def test_schedules() -> None:
    constant = TrainingConfig(max_steps=100, warmup_steps=10, schedule="constant")
    assert [learning_rate_factor(constant, s) for s in (1, 10, 100)] == [0.1, 1.0, 1.0]
    cosine = constant.model_copy(update={"schedule": "cosine"})
    assert learning_rate_factor(cosine, 55) == pytest.approx(0.5) and learning_rate_factor(cosine, 100) == pytest.approx(0.0)
    linear = constant.model_copy(update={"schedule": "linear_decay", "decay_fraction": 0.5})
    assert learning_rate_factor(linear, 50) == 1.0
    assert [learning_rate_factor(linear, s) for s in (51, 76, 100)] == pytest.approx([1.0, 0.5, 0.02])


def test_ema_warms_up() -> None:
    assert ema_decay(0.9999, 0) == pytest.approx(0.1)
    assert ema_decay(0.9999, 10**6) == 0.9999


def test_health_policy_strikes_and_recovers() -> None:
    policy = HealthPolicy(spike_factor=5.0, max_strikes=2)
    for _ in range(60):
        assert policy.reason(1.0, 2.0) is None
        policy.record(2.0, None)
    assert "times its mean" in (policy.reason(1.0, 11.0) or "")
    assert "loss is nan" in (policy.reason(math.nan, 1.0) or "")
    assert policy.reason(1.0, -1.0) == "gradient norm is not finite" == policy.reason(1.0, math.inf)
    assert not policy.record(11.0, "x")
    assert not policy.record(2.0, None), "a good step forgives"
    assert not policy.record(11.0, "x")
    assert policy.record(11.0, "x")
    # A data set joins: other norms are to be expected, and only what is not finite is bad until there is a mean again.
    policy.enter(1)
    assert policy.reason(1.0, 40.0) is None and "loss is nan" in (policy.reason(math.nan, 1.0) or "")
    for _ in range(60):
        policy.record(40.0, None)
    policy.enter(1)
    assert policy.reason(1.0, 100.0) is None and policy.reason(1.0, 300.0) is not None
    again = HealthPolicy(5.0, 2)
    again.load(policy.state())
    assert again.state() == policy.state()


def test_metrics_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1, "loss": math.nan, "grad_norm": -math.inf, "keys_sha256": "a", "samples": 12})
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "keys_sha256": "a", "samples": 12}\n'
    )


def test_binned_losses() -> None:
    bins = BinnedLoss()
    times, ratios = torch.tensor([0.1, 0.15, 0.99, 0.99]), torch.tensor([0.5, 0.5, 1.0, 1.0])
    bins.add(torch.tensor([1.0, 3.0, 5.0, 1e6]), times, ratios, torch.tensor([3.0, 1.0, 1.0, 0.0]))
    assert bins.read() == {
        "loss_timestep/0.0-0.2": 1.5, "loss_timestep/0.8-1.0": 5.0, "loss_mask_ratio/0.4-0.6": 1.5, "loss_mask_ratio/0.8-1.0": 5.0,
    }  # fmt: skip
    assert bins.read() == {}


def test_binned_losses_add_up_to_the_loss_when_only_some_masked_tokens_are_drawn() -> None:
    model = tiny_model(masked_tokens_per_image=12)
    draws = draw_training(model.config, torch.arange(8), model.config.num_tokens)
    assert bool((draws.weights_K == 0).any()), "a picture with fewer masked tokens is padded"
    text, mask = padded(texts(8))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, model.config.num_tokens, model.config.token_channels, generator=generator)
    out = model(tokens, text, mask, texts(1)[0], draws)
    bins = BinnedLoss()
    bins.add(out.per_token, out.timesteps, out.mask_ratio, out.weights)
    for sums, counts in bins.table:
        assert float(sums.sum() / counts.sum()) == pytest.approx(float(out.loss_sum.detach()) / out.count, rel=1e-5)
