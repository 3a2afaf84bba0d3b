"""The decoding engine: guidance, independence of the company an image is in, caches, editing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_fluid import TEXT_WIDTH, texts, tiny_model
from torch import Tensor

from fluid_core.generation import engine
from fluid_core.generation.engine import DecodeSlot, GenerationRequest, decode_step, start, start_batch
from fluid_core.generation.guidance import guidance_weight, guide
from fluid_core.model.fluid import FluidModel
from fluid_core.model.layers import padding_bias
from fluid_core.model.orders import unmask_counts

NULL = torch.randn(1, TEXT_WIDTH, generator=torch.Generator().manual_seed(42))
VARIANTS = [(tokens, order) for tokens in ("continuous", "discrete") for order in ("random", "raster")]


def request(seed: int = 0, **settings: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "text_LE": texts(8)[seed % 8], "negative_text_LE": NULL, "seed": seed, "num_steps": 5, "head_steps": 3,
        "guidance_scale": 3.0, "guidance_schedule": "linear", "temperature": 0.9, "solver": "heun", "grid": (4, 4),
    }  # fmt: skip
    return GenerationRequest(**{**values, **settings})


def finish(model: FluidModel, slots: Sequence[DecodeSlot]) -> list[Tensor]:
    while active := [slot for slot in slots if not slot.done]:
        decode_step(model, active)
    return [slot.tokens_NC for slot in slots]


def generate(model: FluidModel, requests: Sequence[GenerationRequest]) -> list[Tensor]:
    return finish(model, start_batch(model, requests))


# Guidance


def test_linear_guidance_rises_with_the_tokens_generated() -> None:
    """256 tokens in 64 steps, scale 3: 1.01, 1.17, 1.62, 2.99... at the first, quarter, half and last step."""
    known, weights = 0, []
    for count in unmask_counts(256, 64):
        known += count
        weights.append(guidance_weight("linear", 3.0, known, 256))
    assert [round(weights[k], 2) for k in (0, 16, 32)] == [1.01, 1.17, 1.62] and weights[62] > 2.9 and weights[-1] == 3.0
    assert weights == sorted(weights)
    assert [guidance_weight("constant", 3.0, k, 256) for k in (1, 256)] == [3.0, 3.0]


def test_every_step_is_guided_by_the_tokens_known_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a step, scale 3: at step k of 16 the weight of the linear schedule is 1 + 2 (k + 1) / 16."""
    seen: list[float] = []
    monkeypatch.setattr(engine, "guide", lambda c, u, weight, n: seen.append(float(weight[0, 0])) or guide(c, u, weight, n))
    for order in ("random", "raster"):
        generate(tiny_model(order=order), [request(num_steps=16, head_steps=1, solver="euler")])
    assert seen == pytest.approx([1 + 2 * (k + 1) / 16 for k in range(16)] * 2)


def test_guidance_pushes_away_from_the_unconditional_side() -> None:
    c, u = torch.tensor([[2.0, 1.0, 7.0]]), torch.tensor([[1.0, 1.5, 9.0]])
    guided = guide(c, u, torch.tensor([[3.0]]), channels=2)
    assert guided.tolist() == [[4.0, 0.0, 7.0]], "u + w (c - u); the variance comes from the conditional side"
    assert torch.equal(guide(c, u, torch.tensor([[1.0]]), 3), c)
    assert torch.equal(guide(c, u, torch.tensor([[0.0]]), 3), u)


def test_guidance_of_one_needs_no_negative_and_equals_the_conditional_sample() -> None:
    model = tiny_model()
    alone = generate(model, [request(guidance_scale=1.0, negative_text_LE=None)])[0]
    mixed = generate(model, [request(guidance_scale=1.0, negative_text_LE=None), request(1)])[0]
    almost = generate(model, [request(guidance_scale=1.0 + 1e-6, guidance_schedule="constant")])[0]
    assert torch.allclose(alone, mixed, atol=1e-5) and torch.allclose(alone, almost, atol=1e-4)
    assert not torch.allclose(alone, generate(model, [request()])[0], atol=1e-3)


def test_a_negative_prompt_changes_the_image() -> None:
    model = tiny_model()
    plain, negative = generate(model, [request(), request(negative_text_LE=texts(1, seed=9)[0])])
    assert not torch.allclose(plain, negative, atol=1e-3)


# Independence


@pytest.mark.parametrize(
    "tokens,order,objective,solver",
    [
        *((tokens, order, "flow", "heun") for tokens, order in VARIANTS), ("continuous", "random", "flow", "euler"),
        *(("continuous", "random", objective, solver) for objective in ("eps", "v") for solver in ("ddpm", "ddim", "dpm2")),
        ("continuous", "checkerboard", "flow", "heun"),
    ],
)  # fmt: skip
def test_an_image_is_the_same_alone_and_in_a_batch_of_64(tokens: str, order: str, objective: str, solver: str) -> None:
    model = tiny_model(tokens=tokens, order="raster" if order == "raster" else "random", objective=objective)
    settings = {"solver": solver, "order": order if order == "checkerboard" else "random"}
    alone = start(model, request(3, **settings))
    finish(model, [alone])
    for place in (0, 31, 63):
        company = [
            request(100 + i, num_steps=2 + i % 9, guidance_scale=1.0 + i % 3, temperature=0.5 + i / 64, **settings)
            for i in range(63)
        ]
        slots = start_batch(model, [*company[:place], request(3, **settings), *company[place:]])
        finish(model, slots)
        own = slots[place]
        assert torch.equal(own.order_N, alone.order_N), "the order, bit for bit"
        if tokens == "continuous":
            assert torch.equal(own.noise_NC, alone.noise_NC), "the noise, bit for bit"
        assert torch.allclose(own.tokens_NC.float(), alone.tokens_NC.float(), atol=1e-4)


@pytest.mark.parametrize("solver,objective", [("ddpm", "eps"), ("heun", "flow")])
def test_images_may_join_and_leave_between_steps(solver: str, objective: str) -> None:
    model = tiny_model(objective=objective)
    requests = [request(i, num_steps=3 + 2 * i, solver=solver) for i in range(4)]
    expected = [generate(model, [r])[0] for r in requests]
    slots = [start(model, requests[0])]
    decode_step(model, slots)
    slots += start_batch(model, requests[1:3])
    decode_step(model, [slots[2], slots[0]])
    slots.append(start(model, requests[3]))
    decode_step(model, [slots[3], slots[1]])
    for own, wanted in zip(finish(model, slots), expected, strict=True):
        assert torch.allclose(own, wanted, atol=1e-3 if objective == "eps" else 1e-5)


def test_raster_images_of_different_ages_share_a_step() -> None:
    model = tiny_model(order="raster")
    requests = [request(i) for i in range(3)]
    expected = [generate(model, [r])[0] for r in requests]
    slots = [start(model, requests[0])]
    for _ in range(5):
        decode_step(model, slots)
    slots += start_batch(model, requests[1:])
    for own, wanted in zip(finish(model, slots[::-1])[::-1], expected, strict=True):
        assert torch.allclose(own, wanted, atol=1e-5)


def test_seeds_and_prompts_make_different_images() -> None:
    model = tiny_model()
    a, b, c = generate(model, [request(0), request(8), request(0, text_LE=texts(8)[1])])
    assert not torch.allclose(a, b, atol=1e-2) and not torch.allclose(a, c, atol=1e-4)
    assert torch.equal(generate(model, [request(0)])[0], generate(model, [request(0)])[0])


def test_every_token_has_noise_of_its_own() -> None:
    slot = start(tiny_model(), request())
    assert torch.cdist(slot.noise_NC, slot.noise_NC).add(100 * torch.eye(16)).min() > 1
    alone = [[torch.tensor([place])] for place in range(16)]  # as when every token is made in a step of its own
    steps = torch.cat([engine._step_noise([slot], places, 2, 16).flatten(0, 1) for places in alone])
    assert torch.cdist(steps, steps).add(100 * torch.eye(32)).min() > 1, "of ddpm's steps"
    codes = torch.cat([engine._sample_codes([slot], places, torch.zeros(1, 24)) for places in alone])
    assert len(codes.unique()) > 6, "of the softmax"


# Caches


@pytest.mark.parametrize("tokens", ["continuous", "discrete"])
def test_cached_raster_decoding_equals_the_full_pass(tokens: str) -> None:
    """At every step the cached condition is that of a full causal pass over the tokens so far."""
    model = tiny_model(tokens=tokens, order="raster")
    slot = start(model, request())
    conditions: list[Tensor] = []
    original = model.trunk.step
    model.trunk.step = lambda *a: conditions.append(original(*a)) or conditions[-1]  # type: ignore[method-assign]
    finish(model, [slot])
    assert slot.batch is not None
    text = [(pair[0], pair[1]) for pair in slot.batch.text]
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    full = model.trunk(torch.stack([slot.tokens_NC] * 2), hidden, (4, 4), text, padding_bias(slot.batch.text_mask_XL))
    assert torch.allclose(torch.cat(conditions, dim=1), full, atol=1e-4)


def test_reused_text_keys_and_values_equal_recomputed_ones() -> None:
    """A whole decode, recomputing aligner and cross-attention keys before every step from scratch."""
    model = tiny_model()
    expected = generate(model, [request(i) for i in range(3)])
    slots = start_batch(model, [request(i) for i in range(3)])
    while not all(slot.done for slot in slots):
        active = [slot for slot in slots if not slot.done]
        for slot, fresh in zip(active, start_batch(model, [slot.request for slot in active]), strict=True):
            slot.batch, slot.place = fresh.batch, fresh.place
        decode_step(model, active)
    assert all(torch.allclose(slot.tokens_NC, wanted, atol=1e-5) for slot, wanted in zip(slots, expected, strict=True))


def test_text_is_aligned_once_however_many_steps() -> None:
    model, calls = tiny_model(), []
    model.aligner.register_forward_hook(lambda *a: calls.append(1))
    for block in model.trunk.blocks:
        block.cross.kv.register_forward_hook(lambda *a: calls.append(1))
    generate(model, [request(num_steps=16), request(1, num_steps=16)])
    assert len(calls) == 1 + len(model.trunk.blocks)


# The state of an image


@pytest.mark.parametrize("order", ["random", "checkerboard"])
def test_tokens_appear_in_the_slots_order(order: str) -> None:
    model = tiny_model()
    slot = start(model, request(num_steps=6, order=order))
    for step, done in enumerate(torch.tensor(slot.counts).cumsum(0).tolist(), start=1):
        decode_step(model, [slot])
        assert slot.step == step
        known = torch.zeros(16, dtype=torch.bool)
        known[slot.order_N[:done]] = True
        assert torch.equal(slot.known_N, known)
    assert slot.done and bool(slot.known_N.all())
    with pytest.raises(ValueError, match="unfinished images"):
        decode_step(model, [slot])


@pytest.mark.parametrize("tokens,order", VARIANTS)
def test_given_tokens_stay_bit_for_bit(tokens: str, order: str) -> None:
    model = tiny_model(tokens=tokens, order=order)
    before = generate(model, [request(5)])[0]
    keep = torch.arange(16) % 3 == 0
    slot = start(model, request(6, known_tokens_NC=before, known_mask_N=keep, num_steps=16))
    finish(model, [slot])
    assert torch.equal(slot.tokens_NC[keep], before[keep])
    assert bool(slot.known_N.all()) and not torch.equal(slot.tokens_NC[~keep], before[~keep])
    if order == "random":
        assert sum(slot.counts) == len(slot.counts) == int((~keep).sum()), "no step is spent on given tokens"


def test_given_tokens_are_seen() -> None:
    model = tiny_model()
    keep = torch.arange(16) < 8
    a, b = (
        generate(model, [request(known_tokens_NC=torch.full((16, 16), value), known_mask_N=keep)])[0] for value in (0.0, 1.0)
    )
    assert not torch.allclose(a[8:], b[8:], atol=1e-3)


def test_non_square_grids_generate() -> None:
    model = tiny_model()
    tokens = generate(model, [request(grid=(4, 6), num_steps=24)])[0]
    assert tokens.shape == (24, 16) and bool(torch.isfinite(tokens).all())


def test_discrete_temperature_sharpens() -> None:
    model = tiny_model(tokens="discrete")
    for temperature, same in ((1e-6, True), (5.0, False)):  # seeds 0 and 8 have one prompt
        a, b = generate(model, [request(seed, temperature=temperature, num_steps=1) for seed in (0, 8)])
        assert torch.equal(a, b) == same, "near zero: the most likely codes, whatever the seed"


@pytest.mark.parametrize("change,message", [
    ({"num_steps": 17}, "num_steps must be between 1 and the 16 tokens of a 4x4 grid, got 17"),
    ({"num_steps": 0}, "num_steps must be between 1"),
    ({"solver": "ddim"}, "solver 'ddim' does not go with objective 'flow': use one of heun, euler"),
    ({"head_steps": 0}, "head_steps must be at least 1, got 0"),
    ({"order": "spiral"}, "unknown order 'spiral'"),
    ({"guidance_schedule": "cosine"}, "unknown guidance_schedule 'cosine'; one of constant, linear"),
    ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
    ({"temperature": 0.0}, "temperature above 0"),
    ({"negative_text_LE": None}, "guidance needs negative_text_LE"),
    ({"text_LE": torch.zeros(3, 5)}, r"text must be \(1..12 tokens, 16\), got \(3, 5\)"),
    ({"text_LE": torch.zeros(13, 16)}, r"text must be \(1..12 tokens, 16\), got \(13, 16\)"),
    ({"text_LE": torch.full((3, 16), float("nan"))}, "text holds NaN"),
    ({"known_mask_N": torch.ones(16, dtype=torch.bool)}, "go together"),
    ({"known_mask_N": torch.ones(16, dtype=torch.bool), "known_tokens_NC": torch.zeros(16, 16)}, "nothing to generate"),
    ({"known_mask_N": torch.zeros(16, dtype=torch.bool), "known_tokens_NC": torch.zeros(9, 16)}, "known_tokens_NC must be"),
    ({"known_mask_N": torch.zeros(16), "known_tokens_NC": torch.zeros(16, 16)}, "known_mask_N must be bool"),
    ({"known_mask_N": torch.arange(16) < 3, "known_tokens_NC": torch.full((16, 16), torch.nan)}, "known_tokens_NC has NaN"),
    ({"known_mask_N": torch.arange(16) < 3, "known_tokens_NC": torch.zeros(16, 16).long()}, "must be floating-point for continuous"),
    ({"text_LE": None}, "text must be a floating-point tensor, got NoneType"),
    ({"text_LE": torch.zeros(3, 16).long()}, "text must be a floating-point tensor, got torch.int64"),
    ({"grid": (-4, -4)}, r"grid must be two whole numbers of at least 1, got \(-4, -4\)"),
    ({"num_steps": True}, "num_steps must be a whole number, got True"),
])  # fmt: skip
def test_impossible_requests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(tiny_model(), request(**change))


def test_images_that_cannot_share_a_step_are_refused() -> None:
    model = tiny_model()
    slots = start_batch(model, [request()]) + start_batch(model, [request(head_steps=7)])
    with pytest.raises(ValueError, match="one grid, solver and head_steps"):
        decode_step(model, slots)
    with pytest.raises(ValueError, match="one grid"):
        start_batch(model, [request(), request(grid=(2, 4))])
