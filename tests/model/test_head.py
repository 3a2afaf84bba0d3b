"""The diffusion head: its start at zero, its precision, which tokens it sees, and how timesteps pair with tokens."""

import copy
from typing import Any

import pytest
import torch
from tiny_fluid import TEXT_WIDTH, padded, texts, tiny_config, tiny_model
from torch import nn

from fluid_core.diffusion.objectives import add_noise, token_loss
from fluid_core.diffusion.solvers import SOLVERS, solve
from fluid_core.model import fluid
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.random import sample_keys


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randn(count, 16, 16, generator=torch.Generator().manual_seed(5))
    return tokens, *padded(texts(count)), torch.randn(1, TEXT_WIDTH)


def xavier_everywhere(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Embedding | nn.LayerNorm):
        nn.init.normal_(module.weight)


@pytest.mark.parametrize("initialise_again", [False, True])
def test_the_eps_head_starts_with_loss_one(initialise_again: bool) -> None:
    """Zero-initialised output predicts eps = 0, so the squared error is E[eps^2] = 1; other initialisers do not undo it."""
    model = tiny_model(open_zeros=False, objective="eps")
    if initialise_again:
        model.apply(xavier_everywhere)
    config = model.config
    draws = draw_training(config, sample_keys(0, torch.arange(128)), 16)
    x0 = torch.randn(len(draws.rows_K), 16)
    x_t, steps = add_noise("eps", x0, draws.noise_RKC, draws.times_RK)
    prediction = model.head(x_t, steps, model.head.embed_condition(torch.randn(len(x0), 32)))
    assert not bool(prediction.any())
    assert abs((prediction[..., :16] - draws.noise_RKC).square().mean() - 1) < 0.01
    # The whole loss adds the bound's term for the variance, which is small at the start.
    loss = model(*batch(), draws=draw_training(config, sample_keys(0, torch.arange(6)), 16))
    assert 0.95 < loss.loss_sum / loss.count < 1.1


def test_blocks_start_as_the_identity() -> None:
    block = tiny_model(open_zeros=False).head.blocks[0]
    x, y = torch.randn(3, 32), torch.randn(3, 32)
    assert torch.equal(block(x, y), x)


@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
def test_masked_only_loss_is_the_loss_of_all_tokens_then_masked(objective: str) -> None:
    """Gathering masked tokens before the head changes nothing, and timestep r of token n meets z and target of token n."""
    model = tiny_model(objective=objective, order="random", timesteps_per_token=3)
    tokens, text, mask, null = batch()
    keys = sample_keys(1, torch.arange(6))
    draws = draw_training(model.config, keys, 16)
    result = model(tokens, text, mask, null, draws)

    everything = draw_training(tiny_config(objective=objective, timesteps_per_token=3, order="raster"), keys, 16)
    seen: list[tuple[Any, ...]] = []
    hook = model.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model(tokens, text, mask, null, draws)
    hook.remove()
    z_BND = model.trunk(*seen[0])  # of every token
    total = torch.zeros(())
    for b in range(6):  # token by token, timestep by timestep: no repeats, no reshapes
        for n in range(16):
            if not draws.mask_BN[b, n]:
                continue
            for r in range(3):
                row = b * 16 + n
                time, noise = everything.times_RK[r, row], everything.noise_RKC[r, row]
                x_t, step = add_noise(objective, tokens[b, n], noise, time)
                out = model.head(x_t[None, None], step.reshape(1, 1), model.head.embed_condition(z_BND[b, n][None]))
                total = total + token_loss(objective, out[0, 0], tokens[b, n], noise, x_t, time) / 3
    assert torch.allclose(result.loss_sum, total, rtol=1e-4)
    assert result.count == int(draws.mask_BN.sum())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"objective": "eps"}, {"order": "raster"}, {"tokens": "discrete"}, {"masked_tokens_per_image": 4}]
)
def test_what_a_cpu_skips_changes_nothing(settings: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU the last block finishes only what the head reads, and the head takes one timestep at a time; on GPUs neither."""
    model = tiny_model(**settings)
    model.trunk.activation_checkpointing = checkpointing
    tokens, text, mask, null = batch()
    if model.config.tokens == "discrete":
        tokens = torch.randint(0, 24, (6, 16))
    draws = draw_training(model.config, sample_keys(3, torch.arange(6)), 16)
    rows: list[int] = []
    model.trunk.blocks[-1].mlp.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // 32))

    def run(on_cpu: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(fluid, "on_cpu", lambda x: on_cpu)
        model.zero_grad()
        loss = model(tokens, text, mask, null, draws)
        (loss.loss_sum / loss.count).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [loss.loss_sum.detach(), loss.per_token, *(grad.clone() for grad in grads)]

    for skipping, whole in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(skipping, whole, atol=1e-5, rtol=1e-4)
    assert {rows[0], rows[-1]} == {len(draws.rows_K), 6 * 16}


def test_loss_is_per_token_of_the_global_batch() -> None:
    """Sums over ranks divided by the global count equal one process's loss; means of per-rank means do not."""
    model = tiny_model()
    tokens, text, mask, null = batch()
    keys = sample_keys(2, torch.arange(6))
    whole = model(tokens, text, mask, null, draw_training(model.config, keys, 16))
    halves = [
        model(tokens[p], text[p], mask[p], null, draw_training(model.config, keys[p], 16)) for p in (slice(0, 3), slice(3, 6))
    ]
    assert halves[0].count != halves[1].count
    assert torch.allclose(
        sum(h.loss_sum for h in halves) / sum(h.count for h in halves), whole.loss_sum / whole.count, rtol=1e-5
    )
    assert not torch.allclose(sum(h.loss_sum / h.count for h in halves) / 2, whole.loss_sum / whole.count, rtol=1e-5)


def test_a_fixed_number_of_tokens_gives_the_weighted_loss_of_those_tokens() -> None:
    model = tiny_model()
    tokens, text, mask, null = batch()
    keys = sample_keys(1, torch.arange(6))
    whole = model(tokens, text, mask, null, draw_training(model.config, keys, 16))
    some_draws = draw_training(tiny_config(masked_tokens_per_image=4), keys, 16)
    some = model(tokens, text, mask, null, some_draws)
    assert some.count == whole.count
    per_row = dict(
        zip(draw_training(model.config, keys, 16).rows_K.tolist(), whole.per_token.reshape(4, -1).mean(0), strict=True)
    )
    expected = sum(
        w * per_row[row] for row, w in zip(some_draws.rows_K.tolist(), some_draws.weights_K.tolist(), strict=True) if w > 0
    )
    assert torch.allclose(some.loss_sum, expected, rtol=1e-4)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_eps_head_and_its_loss_compute_in_fp32(weights: torch.dtype, autocast: bool) -> None:
    """Under autocast, and with bf16 parameters (DeepSpeed bf16): same dtypes everywhere in the head."""
    model = tiny_model(objective="eps").to(weights)
    dtypes = set()
    for module in model.head.modules():
        module.register_forward_hook(
            lambda module, inputs, output: (
                dtypes.update(t.dtype for t in (*inputs, output)) if module is not model.head else None
            )
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*batch(), draws=draw_training(model.config, sample_keys(0, torch.arange(6)), 16))
    assert dtypes == {torch.float32}
    assert loss.loss_sum.dtype == loss.per_token.dtype == torch.float32
    # fp32 arithmetic on bf16-rounded weights: the same function as those weights in fp32.
    exact = copy.deepcopy(model.head).float()
    x, z = torch.randn(2, 5, 16), torch.randn(5, 32)
    step = torch.tensor([500.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.head(x, step, model.head.embed_condition(z))
    assert torch.equal(out, exact(x, step, exact.embed_condition(z)))


@pytest.mark.parametrize("objective,solver", [(arm, solver) for arm in ("flow", "v") for solver in SOLVERS[arm]])
def test_flow_and_v_heads_in_bf16_stay_close_to_fp32(objective: str, solver: str) -> None:
    """Neither velocity nor v amplifies: every solver's result moves by no more than a few roundings of the head's output."""
    model = tiny_model(objective=objective, head_precision="bf16")
    exact = copy.deepcopy(model)
    exact.head.as_trunk = False
    z, noise = torch.randn(200, 32), torch.randn(200, 16)
    results = []
    for head in (model.head, exact.head):
        with torch.autocast("cpu", torch.bfloat16):
            condition = head.embed_condition(z)

        def predict(x: torch.Tensor, t: float, head: nn.Module = head, condition: torch.Tensor = condition) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return head(x, torch.tensor([t]), condition)

        results.append(solve(objective, solver, predict, noise, 10, 1.0, lambda i: noise.roll(i, 0)))
    error = (results[0] - results[1]).square().mean().sqrt()
    output = exact.head(noise, torch.tensor([500.0]), exact.head.embed_condition(z)).square().mean().sqrt()
    assert 0 < error < 0.02 * output.clamp(min=1.0)


def test_a_bf16_head_is_in_fp32_where_the_trunk_is() -> None:
    head = tiny_model(objective="flow", head_precision="bf16").head
    exact = copy.deepcopy(head)
    exact.as_trunk = False
    x, step, z = torch.randn(2, 5, 16), torch.tensor([500.0]), torch.randn(5, 32)
    assert torch.equal(head(x, step, head.embed_condition(z)), exact(x, step, exact.embed_condition(z)))
    head.to(torch.bfloat16)
    assert head.embed_condition(z).dtype == torch.bfloat16
    assert not torch.equal(head(x, step, head.embed_condition(z)), exact(x, step, exact.embed_condition(z)))


def test_eps_head_refuses_bf16() -> None:
    with pytest.raises(ValueError, match="the eps head amplifies rounding errors"):
        tiny_config(objective="eps", head_precision="bf16")


def test_condition_and_output_shapes() -> None:
    model = FluidModel(tiny_config(objective="eps", head_width=48))
    condition = model.head.embed_condition(torch.randn(7, 32))
    assert condition.shape == (7, 48)
    assert model.head(torch.randn(3, 7, 16), torch.rand(3, 7) * 1000, condition).shape == (3, 7, 32)
