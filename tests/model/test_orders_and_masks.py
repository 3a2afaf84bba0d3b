"""Unmasking schedules, orders, mask ratios."""

import itertools

import pytest
import torch

from fluid_core.model.masking import mask_last, mask_ratio, masked_counts
from fluid_core.model.orders import first_stage, token_order, unmask_counts
from fluid_core.random import sample_keys

KEYS = sample_keys(0, torch.arange(64))


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 256])
def test_counts_sum_to_all_tokens_for_every_number_of_steps(tokens: int) -> None:
    for steps in range(1, tokens + 1):
        counts = unmask_counts(tokens, steps)
        assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1


def test_counts_are_those_of_the_cosine_schedule() -> None:
    counts = unmask_counts(256, 64)
    assert counts[:13] == [1] * 13 and counts[13] > 1
    assert counts[-4:] == [7, 6, 6, 6] and max(counts) == 7
    done = list(itertools.accumulate(counts))
    assert done[42] >= 128 > done[41], "half of the tokens exist only after 43 of 64 steps"
    assert unmask_counts(256, 16)[:4] == [2, 3, 7, 8] and max(unmask_counts(256, 16)) == 25


@pytest.mark.parametrize("steps", [0, 17])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the 16 tokens to generate, got {steps}"):
        unmask_counts(16, steps)


@pytest.mark.parametrize("grid,keys", [((0, 4), KEYS), ((4, 4), KEYS.float()), ((4, 4), KEYS[None])])
def test_orders_of_nothing_and_of_no_keys_are_refused(grid: tuple[int, int], keys: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="wanted int64 keys"):
        token_order("raster", keys, grid, stream=0)


@pytest.mark.parametrize("kind", ["random", "raster", "checkerboard"])
def test_an_order_is_a_permutation(kind: str) -> None:
    order = token_order(kind, KEYS, (4, 6), stream=0)
    assert torch.equal(order.sort(dim=1).values, torch.arange(24).expand(64, -1))


def test_random_orders_are_uniform_and_differ() -> None:
    order = token_order("random", sample_keys(0, torch.arange(4000)), (2, 2), stream=0)
    first = torch.bincount(order[:, 0], minlength=4) / 4000
    assert torch.allclose(first, torch.full((4,), 0.25), atol=0.03)


def test_checkerboard_finishes_one_colour_before_the_other() -> None:
    order = token_order("checkerboard", KEYS, (4, 4), stream=0)
    colour = (order // 4 + order % 4) % 2
    assert bool((colour[:, :8] == 0).all()) and bool((colour[:, 8:] == 1).all())
    assert len({tuple(row.tolist()) for row in order}) > 60


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_no_step_mixes_the_colours_of_a_checkerboard(grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    (order,) = token_order("checkerboard", sample_keys(0, torch.zeros(1, dtype=torch.int64)), grid, 0)
    first = first_stage(order, grid)
    assert first == (tokens + 1) // 2
    for steps in range(2, tokens + 1):
        counts = unmask_counts(tokens, steps, first)
        assert sum(counts) == tokens and len(counts) == steps and min(counts) >= 1
        assert first in itertools.accumulate(counts)


def test_unknown_order_is_named() -> None:
    with pytest.raises(ValueError, match="unknown order 'spiral'; one of random, raster, checkerboard"):
        token_order("spiral", KEYS, (4, 4), stream=0)


def test_mask_ratio_laws() -> None:
    u = (torch.arange(100_000) + 0.5) / 100_000
    cosine = mask_ratio("cosine", u)
    assert abs(cosine.mean() - 0.6366) < 1e-3 and cosine.min() > 0 and cosine.max() <= 1
    # P(ratio <= r) of the cosine law is 1 - 2 acos(r) / pi... at r = 0.5: 1/3.
    assert abs((cosine <= 0.5).float().mean() - 1 / 3) < 1e-3
    normal = mask_ratio("truncnorm", u)
    assert abs(normal.mean() - 0.867) < 1e-3 and abs(normal.min() - 0.7) < 1e-3 and normal.max() <= 1
    with pytest.raises(ValueError, match="unknown mask_law"):
        mask_ratio("uniform", u)


def test_masked_tokens_are_the_last_of_the_order() -> None:
    order = token_order("random", KEYS, (4, 4), stream=0)
    counts = masked_counts(torch.linspace(0.001, 1.0, 64), 16)
    mask = mask_last(order, counts)
    assert torch.equal(mask.sum(1), counts) and counts.min() == 1 and counts.max() == 16
    for row in range(64):
        assert bool(mask[row, order[row, 16 - counts[row] :]].all())
