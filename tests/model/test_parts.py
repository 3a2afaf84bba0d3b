"""Attention, positions, and the independence from padding."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from tiny_fluid import TEXT_WIDTH, padded, texts, tiny_model
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from fluid_core.model import layers
from fluid_core.model.layers import Packing, attend, causal_bias, padding_bias
from fluid_core.model.positions import GridPositions, TextPositions
from fluid_core.training.engine import whole_rows


@pytest.mark.parametrize("queries,keys", [(16, 16), (1, 16), (65, 65), (16, 100)])
def test_both_attention_paths_agree_with_the_fused_kernel(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, queries, 8), torch.randn(3, 2, keys, 8), torch.randn(3, 2, keys, 8)
    mask = torch.rand(3, keys) < 0.7
    mask[:, 0] = True
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    for limit in (0, 1000):  # always fused; always plain
        monkeypatch.setattr(layers, "_EXPLICIT_MAX_KEYS", {torch.float32: limit})
        assert torch.allclose(attend(q, k, v, padding_bias(mask)), expected, atol=1e-5)


def test_causal_bias_hides_the_future() -> None:
    q, k, v = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attend(q, k, v, causal_bias(6, q.device)), expected, atol=1e-6)


def test_queries_and_keys_are_normalised() -> None:
    """Scaling a block's query and key weights changes nothing: attention logits cannot grow without bound."""
    model = tiny_model()
    attention, x = model.trunk.blocks[0].attention, torch.randn(2, 16, 32)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:64] *= 100
    assert torch.allclose(attention(x), before, atol=1e-3)
    cross, packing = model.trunk.blocks[0].cross, Packing(torch.ones(2, 5, dtype=torch.bool))
    text = torch.randn(10, 32)
    before = cross(x, cross.keys_values(text, packing), None)
    with torch.no_grad():
        cross.q.weight *= 100
        cross.kv.weight[:32] *= 100
    assert torch.allclose(cross(x, cross.keys_values(text, packing), None), before, atol=1e-3)


def test_grid_positions_start_as_two_axes_of_sinusoids() -> None:
    table = GridPositions(4, 32)((4, 4)).reshape(4, 4, 32)
    assert torch.equal(table[1, 0, :16], table[1, 3, :16]) and torch.equal(table[0, 2, 16:], table[3, 2, 16:])
    assert abs(table.square().mean().sqrt() - 0.7 / math.sqrt(2)) < 0.01
    distance = (table[0, 0] - table[0]).square().sum(-1)
    assert bool((distance[1:] > distance[:-1]).all()), "neighbours are nearer"


def test_grid_positions_interpolate_to_other_grids() -> None:
    positions = GridPositions(4, 32)
    wide = positions((4, 8)).reshape(4, 8, 32)
    assert wide.shape == (4, 8, 32)
    # Rows are as they were up to the interpolation's rounding; columns are twice as fine.
    assert torch.allclose(wide[:, :, :16], positions((4, 4)).reshape(4, 4, 32)[:, :1, :16].expand(-1, 8, -1), atol=0.1)
    middle = (wide[:, 2, 16:] + wide[:, 3, 16:]) / 2
    assert torch.allclose(middle, positions((4, 4)).reshape(4, 4, 32)[:, 1, 16:], atol=0.1)


def test_text_positions_tell_places_apart() -> None:
    table = TextPositions(12, 32)(12)
    assert torch.cdist(table, table).add(torch.eye(12) * 10).min() > 0.1


def test_the_aligner_knows_the_order_of_words() -> None:
    """Swapping two words' states changes more than their places: the aligner has positions of its own."""
    model = tiny_model()
    state = torch.randn(1, 6, TEXT_WIDTH)
    swapped = state[:, [1, 0, 2, 3, 4, 5]]
    mask = torch.ones(1, 6, dtype=torch.bool)
    out, other = model.aligner(state, mask)[0], model.aligner(swapped, mask)[0]
    assert not torch.allclose(out[0], other[1], atol=1e-2)


@pytest.mark.parametrize("order", ["random", "raster"])
def test_padding_has_no_influence(order: str) -> None:
    model, states = tiny_model(order=order), texts(3)
    tokens, hidden = torch.randn(3, 16, 16), torch.rand(3, 16) < 0.5

    def run(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pairs = model.trunk.text_keys_values(*model.aligner(text, mask))
        return model.trunk(tokens, hidden, (4, 4), pairs, padding_bias(mask))

    text, mask = padded(states, length=12)
    expected = run(text, mask)
    text[~mask] = 1e4 * torch.randn(int((~mask).sum()), TEXT_WIDTH)
    assert torch.equal(run(text, mask), expected), "what stands in the padding"
    packed, packing = model.aligner(text, mask)
    assert len(packed) == sum(len(state) for state in states), "padding is not computed"
    assert torch.equal(packing.pack(packing.unpack(packed)), packed)
    longest = max(len(state) for state in states)
    assert torch.allclose(run(*padded(states, length=longest)), expected, atol=1e-5), "how long the padding is"
    for b, state in enumerate(states):
        pairs = model.trunk.text_keys_values(*model.aligner(*padded([state])))
        alone = model.trunk(tokens[b : b + 1], hidden[b : b + 1], (4, 4), pairs, None)
        assert torch.allclose(alone[0], expected[b], atol=1e-5)


def test_random_order_sees_only_known_tokens_and_raster_only_earlier_ones() -> None:
    states = texts(1)
    text, mask = padded(states)
    tokens = torch.randn(1, 16, 16)
    changed = tokens.clone()
    changed[:, 9] += 1
    for order in ("random", "raster"):
        model = tiny_model(order=order)
        pairs = model.trunk.text_keys_values(*model.aligner(text, mask))
        hidden = torch.zeros(1, 16, dtype=torch.bool)
        hidden[:, 9] = True
        a, b = (model.trunk(x, hidden, (4, 4), pairs, None) for x in (tokens, changed))
        if order == "random":
            assert torch.equal(a, b), "a hidden token's value reaches nothing"
            visible = model.trunk(changed, ~hidden, (4, 4), pairs, None)
            assert not torch.allclose(visible[:, 0], a[:, 0])
        else:
            assert torch.equal(a[:, :10], b[:, :10]), "a token does not see itself or what comes after it"
            assert not torch.allclose(a[:, 10], b[:, 10])


def test_conditions_of_some_places_equal_those_of_all() -> None:
    """Generation reads few places: the last block finishes only those."""
    model, (text, mask) = tiny_model(), padded(texts(3))
    tokens, hidden = torch.randn(3, 16, 16), torch.rand(3, 16) < 0.5
    pairs, bias = model.trunk.text_keys_values(*model.aligner(text, mask)), padding_bias(mask)
    places = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    some = model.trunk(tokens, hidden, (4, 4), pairs, bias, places)
    full = model.trunk(tokens, hidden, (4, 4), pairs, bias)
    assert torch.allclose(some, full.take_along_dim(places[..., None], dim=1), atol=1e-5)


@pytest.fixture
def ragged_attention_on_cpu() -> None:
    """Flash attention over rows of different lengths has kernels for GPUs alone: here it gets slow ones, row by row."""

    def rows(starts_q: torch.Tensor, starts_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        q, k = starts_q.tolist(), starts_k.tolist()
        assert q[0] == k[0] == 0 and len(q) == len(k)
        return zip(map(slice, q, q[1:]), map(slice, k, k[1:]), strict=False)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    def forward(q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, longest_q: int, longest_k: int, *_: Any) -> Any:
        assert max(starts_q.diff()) <= longest_q and max(starts_k.diff()) <= longest_k and starts_k[-1] == len(k)
        out = torch.empty_like(q)
        for a, b in rows(starts_q, starts_k):
            out[a] = attend(q[a], k[b], v[b])
        return out, torch.empty(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad: Any, q: Any, k: Any, v: Any, _out: Any, _lse: Any, starts_q: Any, starts_k: Any, *_: Any) -> Any:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for a, b in rows(starts_q, starts_k):
            _, pull = torch.func.vjp(attend, q[a], k[b], v[b])
            grads[0][a], grads[1][b], grads[2][b] = pull(grad[a])
        return tuple(grads)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ragged_rows_give_what_padded_rows_give(checkpointing: bool, ragged_attention_on_cpu: None) -> None:
    """What a GPU trains with: the aligner and the attention to the text take every caption at its own length."""
    model = tiny_model()
    model.trunk.activation_checkpointing = checkpointing
    text, mask = padded(texts(3), length=12)
    tokens, hidden = torch.randn(3, 16, 16), torch.rand(3, 16) < 0.5

    def run(ragged: bool) -> list[torch.Tensor]:
        model.zero_grad()
        text_TD, packing = model.aligner(text, mask, ragged)
        pairs = model.trunk.text_keys_values(text_TD, packing)
        z = model.trunk(tokens, hidden, (4, 4), pairs, packing if ragged else padding_bias(mask))
        (z * z.detach().cos()).sum().backward()
        return [z.detach(), *(p.grad.clone() for part in (model.aligner, model.trunk) for p in part.parameters())]

    for ragged, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ragged, expected, atol=1e-4, rtol=1e-4)


def test_compiled_trunks_keep_residuals_in_half_precision() -> None:
    """What compile_blocks sets: under autocast the stream is bf16, and what it costs in exactness is bf16's own error."""
    model, (text, mask) = tiny_model(), padded(texts(3))
    tokens, hidden = torch.randn(3, 16, 16), torch.rand(3, 16) < 0.5
    seen: list[torch.dtype] = []
    model.trunk.blocks[1].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))

    def run() -> torch.Tensor:
        pairs = model.trunk.text_keys_values(*model.aligner(text, mask))
        return model.trunk(tokens, hidden, (4, 4), pairs, padding_bias(mask)).detach()

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        usual = run()
        model.trunk.half_residuals = True
        half = run()
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert (half - exact).std() < 3 * (usual - exact).std() < 0.1 * exact.std()


def test_compiled_reductions_over_heads_and_widths_hold_a_row() -> None:
    """What compile_blocks tells the compiler; longer rows, rows of unknown length and strided ones stay as they were."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V

    unknown = sympy.Symbol("s0", integer=True, positive=True)
    rows = [(96, False), (2304, True), (4608, True), (1536, False), (unknown, True)]

    def held(choices: Any) -> list[bool]:
        with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
            found = []
            for channels, inner in rows:
                hint = ReductionHint.INNER if inner else ReductionHint.DEFAULT
                features = SimpleNamespace(reduction_numel=sympy.sympify(channels), get_reduction_hint=lambda hint=hint: hint)
                found.append(choices.should_use_persistent_reduction(features, False))
        return found

    before = V.choices
    try:
        whole_rows()
        assert held(V.choices) == [True, True, False, False, False]
        assert held(InductorChoices) == [False] * len(rows)
    finally:
        V.set_choices_handler(before)
