"""Training draws: pure functions of each sample's key."""

import pytest
import torch
from tiny_fluid import tiny_config

from fluid_core.model.draws import TrainingDraws, draw_training
from fluid_core.random import sample_keys

KEYS = sample_keys(7, torch.arange(100, 164))


def of_sample(draws: TrainingDraws, b: int) -> dict[str, torch.Tensor]:
    N = draws.mask_BN.shape[1]
    own = draws.rows_K // N == b
    return {
        "mask": draws.mask_BN[b],
        "ratio": draws.mask_ratio_B[b],
        "order": draws.order_BN[b],
        "drop": draws.drop_text_B[b],
        "tokens": draws.rows_K[own] % N,
        "weights": draws.weights_K[own],
        "times": draws.times_RK[:, own],
        "noise": draws.noise_RKC[:, own],
    }


@pytest.mark.parametrize("settings", [{}, {"objective": "eps"}, {"masked_tokens_per_image": 5}, {"order": "raster"}])
def test_a_samples_draws_do_not_depend_on_its_batch(settings: dict[str, object]) -> None:
    config = tiny_config(**settings)
    whole = draw_training(config, KEYS, 16)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other = draw_training(config, KEYS[shuffled], 16)
    for b in (0, 1, 31, 63):
        alone = of_sample(draw_training(config, KEYS[b : b + 1], 16), 0)
        place = int((shuffled == b).nonzero())
        for company in (of_sample(whole, b), of_sample(other, place)):
            for name, value in alone.items():
                assert torch.equal(value, company[name]), name


def test_different_samples_and_seeds_differ() -> None:
    config = tiny_config()
    a, b = (draw_training(config, sample_keys(seed, torch.arange(8)), 16) for seed in (0, 1))
    assert not torch.equal(a.order_BN, b.order_BN)
    noise = of_sample(a, 0)["noise"]
    assert not torch.equal(noise[0], noise[1]), "the timesteps of one token have noise of their own"
    assert not torch.equal(of_sample(a, 0)["order"], of_sample(a, 1)["order"])


def test_the_head_sees_exactly_the_masked_tokens() -> None:
    draws = draw_training(tiny_config(), KEYS, 16)
    assert torch.equal(draws.rows_K, draws.mask_BN.flatten().nonzero()[:, 0])
    assert draws.count == int(draws.mask_BN.sum()) == len(draws.rows_K)
    assert draws.times_RK.shape == (4, len(draws.rows_K)) and draws.noise_RKC.shape == (4, len(draws.rows_K), 16)


def test_time_laws() -> None:
    keys = sample_keys(0, torch.arange(500))
    eps = draw_training(tiny_config(objective="eps"), keys, 16).times_RK
    assert torch.allclose(torch.histc(eps, 10, 0, 1) / eps.numel(), torch.full((10,), 0.1), atol=0.01)
    flow = draw_training(tiny_config(objective="flow"), keys, 16).times_RK
    logit = torch.logit(flow)
    assert abs(logit.mean()) < 0.02 and abs(logit.std() - 1) < 0.02
    noise = draw_training(tiny_config(), keys, 16).noise_RKC
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_caption_dropout_rate() -> None:
    drops = draw_training(tiny_config(), sample_keys(0, torch.arange(20_000)), 1).drop_text_B
    assert abs(drops.float().mean() - 0.1) < 0.01


def test_raster_order_predicts_every_token() -> None:
    draws = draw_training(tiny_config(order="raster"), KEYS, 16)
    assert bool(draws.mask_BN.all()) and draws.count == 64 * 16


def test_a_fixed_number_of_tokens_has_static_shapes_and_an_unbiased_sum() -> None:
    """Any function of the masked tokens has the same expected sum when only some of them are drawn and weighted."""
    values = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).square()
    keys, light = sample_keys(3, torch.arange(20_000)), {"timesteps_per_token": 1, "latent_channels": 1, "patch": 1}
    full = draw_training(tiny_config(**light), keys, 16)
    some = draw_training(tiny_config(masked_tokens_per_image=3, **light), keys, 16)
    assert len(some.rows_K) == 3 * len(keys)
    assert torch.equal(full.mask_BN, some.mask_BN) and full.count == some.count
    exact = (full.mask_BN * values).sum()
    estimate = (values.expand(len(keys), -1).flatten()[some.rows_K] * some.weights_K).sum()
    assert abs(estimate / exact - 1) < 0.015
    counted = some.weights_K > 0
    assert bool(full.mask_BN.flatten()[some.rows_K][counted].all()), "only masked tokens count"
    assert abs(some.weights_K.sum() / some.count - 1) < 1e-4
    rows = some.rows_K[counted]
    assert len(rows) == len(rows.unique()), "without replacement"


def test_bad_keys_and_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted int64 keys \(batch,\) and a grid, got torch.float32 \(3,\)"):
        draw_training(tiny_config(), torch.zeros(3), 16)
    with pytest.raises(ValueError, match="a grid of 4x5 does not hold 16 tokens"):
        draw_training(tiny_config(), KEYS, 16, (4, 5))
    with pytest.raises(ValueError, match="masked_tokens_per_image 20 is more than the 16 tokens"):
        draw_training(tiny_config(masked_tokens_per_image=20), KEYS, 16)
    with pytest.raises(ValueError, match="mask_law truncnorm is of order: random"):
        tiny_config(order="raster", mask_law="truncnorm")
