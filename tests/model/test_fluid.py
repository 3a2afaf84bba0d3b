"""The whole model: variants, parameter counts, caption dropout, and that every variant learns."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_fluid import TEXT_TOKENS, TEXT_WIDTH, padded, texts, tiny_config, tiny_model

from fluid_core.commands.presets import preset_rows
from fluid_core.config import PRESETS
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel, drop_captions
from fluid_core.muon import hidden_matrices
from fluid_core.random import sample_keys

VARIANTS = [(tokens, order) for tokens in ("continuous", "discrete") for order in ("random", "raster")]


def some_tokens(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "continuous":
        return torch.randn(count, 16, 16, generator=generator)
    return torch.randint(0, 24, (count, 16), generator=generator)


def test_parameters_are_within_four_percent_of_the_papers() -> None:
    rows = {row["name"]: row for row in preset_rows()}
    assert rows.keys() == PRESETS.keys()
    named = {name: row for name, row in rows.items() if row["paper_parameters"]}
    assert set(named) == {"fluid-166m", "fluid-369m", "fluid-665m", "fluid-1.1b", "fluid-3.1b", "fluid-10.5b"}
    for name, row in named.items():
        assert abs(row["parameters"] / row["paper_parameters"] - 1) < 0.04, name
    assert (rows["fluid-10.5b"]["blocks"], rows["fluid-10.5b"]["width"], rows["fluid-10.5b"]["heads"]) == (34, 4096, 64)


def test_presets_command_prints_json() -> None:
    result = subprocess.run([sys.executable, "-m", "fluid_core.cli", "presets", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)[1]
    assert {"name", "parameters", "blocks", "width", "heads", "paper_parameters"} <= row.keys() and row["name"] == "fluid-166m"


@pytest.mark.parametrize("tokens,order", VARIANTS)
def test_every_parameter_learns(tokens: str, order: str) -> None:
    model = tiny_model(tokens=tokens, order=order)
    draws = draw_training(model.config, sample_keys(0, torch.arange(8)), 16)
    loss = model(some_tokens(tokens, 8), *padded(texts(8)), torch.randn(1, TEXT_WIDTH), draws)
    loss.loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize("tokens,order,objective,goal", [
    ("continuous", "random", "flow", 0.35), ("continuous", "random", "eps", 0.40), ("continuous", "random", "v", 0.35),
    ("continuous", "raster", "flow", 0.35), ("discrete", "random", "flow", 0.05), ("discrete", "raster", "flow", 0.05),
])  # fmt: skip
def test_overfits_eight_images(tokens: str, order: str, objective: str, goal: float) -> None:
    """A constant prediction has loss 2 (flow), 1 (eps, v) or log 24 = 3.2 (codes)."""
    torch.manual_seed(0)
    model = FluidModel(tiny_config(tokens=tokens, order=order, objective=objective, width=64, caption_dropout=0.0))
    images, (text, mask) = some_tokens(tokens, 8), padded(texts(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    steps, losses = 150 if tokens == "discrete" else 300, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        draws = draw_training(model.config, sample_keys(step, torch.arange(8)), 16)
        result = model(images, text, mask, torch.zeros(1, TEXT_WIDTH), draws)
        loss = result.loss_sum / result.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < goal
    # It reads the caption, also where the tokens before would tell the images apart: of the wrong caption it expects another image.
    draws = draw_training(model.config, sample_keys(0, torch.arange(8)), 16)
    with torch.no_grad():
        own, wrong = (
            model(images, text.roll(shift, 0), mask.roll(shift, 0), torch.zeros(1, TEXT_WIDTH), draws).loss_sum.item()
            for shift in (0, 1)
        )
    assert wrong > 1.5 * own, (own, wrong)


def test_dropped_captions_become_the_empty_one() -> None:
    text, mask = padded(texts(3))
    null = torch.randn(2, TEXT_WIDTH)
    out, out_mask = drop_captions(text, mask, null, torch.tensor([False, True, False]))
    assert torch.equal(out[[0, 2]], text[[0, 2]]) and torch.equal(out_mask[[0, 2]], mask[[0, 2]])
    assert torch.equal(out[1, :2], null) and out_mask[1].tolist() == [True, True] + [False] * (text.shape[1] - 2)
    long_null = torch.randn(text.shape[1] + 3, TEXT_WIDTH)
    out, out_mask = drop_captions(text, mask, long_null, torch.tensor([True, False, False]))
    assert torch.equal(out[0], long_null) and not bool(out_mask[1:, -3:].any())


def test_muon_gets_the_hidden_matrices_alone() -> None:
    model = tiny_model()
    names = [name for name, _ in hidden_matrices(model)]
    assert "trunk.blocks.0.attention.qkv.weight" in names and "head.blocks.1.modulation.weight" in names
    assert "aligner.blocks.0.mlp.up.weight" in names
    assert all(".blocks." in name and name.endswith(".weight") for name in names)
    assert all(p.ndim == 2 for _, p in hidden_matrices(model))


def test_builds_on_the_meta_device_and_takes_weights() -> None:
    with torch.device("meta"):
        model = FluidModel(tiny_config())
    assert all(p.is_meta for p in model.parameters())
    real = tiny_model()
    model.load_state_dict(real.state_dict(), assign=True)
    draws = draw_training(model.config, sample_keys(0, torch.arange(2)), 16)
    inputs = (some_tokens("continuous", 2), *padded(texts(2)), torch.ones(1, TEXT_WIDTH), draws)
    assert torch.equal(model(*inputs).loss_sum, real(*inputs).loss_sum)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        model = tiny_model()
        model.trunk.activation_checkpointing = on
        draws = draw_training(model.config, sample_keys(0, torch.arange(4)), 16)
        model(some_tokens("continuous", 4), *padded(texts(4)), torch.ones(1, TEXT_WIDTH), draws).loss_sum.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_non_square_grids_train() -> None:
    model = tiny_model()
    draws = draw_training(model.config, sample_keys(0, torch.arange(2)), 24)
    loss = model(torch.randn(2, 24, 16), *padded(texts(2)), torch.ones(1, TEXT_WIDTH), draws, grid=(4, 6))
    assert bool(torch.isfinite(loss.loss_sum))


def test_bad_input_is_named() -> None:
    model, (text, mask), null = tiny_model(), padded(texts(2)), torch.ones(1, TEXT_WIDTH)
    draws = draw_training(model.config, sample_keys(0, torch.arange(2)), 16)
    with pytest.raises(ValueError, match=r"tokens must be floating-point \(2, 16, 16\), got torch.float32 \(2, 16, 4\)"):
        model(torch.randn(2, 16, 4), text, mask, null, draws)
    with pytest.raises(ValueError, match="tokens must be floating-point"):
        model(torch.zeros(2, 16, 16, dtype=torch.int64), text, mask, null, draws)
    with pytest.raises(ValueError, match=r"tokens must be int64 \(2, 16\), got torch.int32"):
        tiny_model(tokens="discrete")(torch.zeros(2, 16, dtype=torch.int32), text, mask, null, draws)
    with pytest.raises(ValueError, match=r"text must be \(2, L, 16\)"):
        model(torch.randn(2, 16, 16), text[..., :8], mask, null, draws)
    with pytest.raises(ValueError, match=r"null_text must be \(L, 16\) of at most 12 tokens, got \(1, 8\)"):
        model(torch.randn(2, 16, 16), text, mask, null[:, :8], draws)
    with pytest.raises(ValueError, match="longer than max_text_tokens 12"):
        model(torch.randn(2, 16, 16), *padded(texts(2), length=TEXT_TOKENS + 1), null, draws)
