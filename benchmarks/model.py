"""The method: training steps and generation against a straightforward reference, and where the time goes.

    python -m benchmarks.run model

Each pair runs interleaved in this process; the ratio is the median of the pairs' own. On CPU it is CPU time, which other work on
the machine disturbs least. The reference (benchmarks/reference_model.py) has the same weights and gives the same numbers: checked.
bf16 is measured where the CPU computes it; emulated, it would take hours. GPUs: benchmarks/gpu.py.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel

from benchmarks import reference_model as reference
from fluid_core.config import ModelConfig
from fluid_core.encoders.text import DTYPES, TextEncoder
from fluid_core.generation.engine import DecodeSlot, GenerationRequest, decode_step, start_batch
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.model.layers import Packing
from fluid_core.precision import computes_bf16
from fluid_core.random import sample_keys

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A geometry and how much of it is measured.

    Generation makes the last `new_tokens` of each image in `num_steps` steps: a whole image, or as many tokens a step as a whole
    image in 64 steps has on average. `first_sample`: the batch's masked share is near the law's mean of 64%.
    """

    name: str
    settings: dict[str, Any]
    caption_tokens: tuple[int, int]
    batch: int
    first_sample: int
    images: int
    new_tokens: int
    num_steps: int
    head_steps: int
    repeats: int
    t5: dict[str, int]
    vae: dict[str, Any]


CASES = (
    Case(
        "fluid-tiny", {"grid": 4, "text_width": 128, "max_text_tokens": 32}, (4, 12),
        batch=64, first_sample=0, images=32, new_tokens=16, num_steps=12, head_steps=16, repeats=7,
        t5={"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 32},
        vae={"in_channels": 48, "out_channels": 48, "block_out_channels": (64, 128), "layers_per_block": 1},
    ),
    Case(  # the recipe's encoders: T5-XXL and the VAE of Stable Diffusion
        "fluid-166m", {"text_width": 4096}, (8, 40),
        batch=8, first_sample=20, images=1, new_tokens=12, num_steps=3, head_steps=25, repeats=3,
        t5={"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64},
        vae={"in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    ),
)  # fmt: skip


def rows() -> list[Row]:
    """Rows for the harness; the targets are the issue's."""
    result = []
    precisions = ("fp32", "bf16") if computes_bf16(torch.device("cpu")) else ("fp32",)
    for case in CASES:
        for precision in precisions:
            result.append(_training(case, precision))
            result.append(_training(case, precision, _t5(case, precisions[-1])))
            result += _generation(case, precision)
    for case in CASES:
        result += _parts(case, precisions)
        result += _encoders(case, precisions[-1])
    result += [_attention(tokens, precision) for tokens in (16, 64, 256) for precision in precisions]
    return result


def _model(case: Case, precision: str) -> FluidModel:
    torch.manual_seed(0)
    model = FluidModel(ModelConfig(preset=case.name, objective="flow", head_precision=precision, **case.settings))
    for name, parameter in model.named_parameters():  # an untrained head is all zeros: give it something to compute
        if name.startswith("head.") and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _captions(case: Case, count: int) -> list[torch.Tensor]:
    low, high = case.caption_tokens
    width = case.settings["text_width"]
    return [torch.randn(low + i * (high - low) // max(1, count - 1), width) for i in range(count)]


def _padded(states: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    text, mask = torch.zeros(len(states), length, states[0].shape[1]), torch.zeros(len(states), length, dtype=torch.bool)
    for i, state in enumerate(states):
        text[i, : len(state)], mask[i, : len(state)] = state, True
    return text, mask


def _t5(case: Case, dtype: str) -> TextEncoder:
    """A T5 of random weights, frozen; each layer is a copy of the first, as 4.7 billion random numbers take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **{**case.t5, "num_layers": 1}))
    torch.set_default_dtype(before)
    layers = model.encoder.block
    layers.extend(copy.deepcopy(layers[0]) for _ in range(1, case.t5["num_layers"]))
    return TextEncoder(model.to(DTYPES[dtype]), None, ModelConfig(preset=case.name, **case.settings).max_text_tokens)


def _training(case: Case, precision: str, t5: TextEncoder | None = None) -> Row:
    """Forward and backward of one batch; the reference pads captions to the text limit, ours to the batch's longest.

    With `t5` the step encodes its captions (`text.mode: tokens`): ours caption by caption of one length, the reference padded.
    """
    model = _model(case, precision)
    config, N = model.config, model.config.num_tokens
    captions, null = _captions(case, case.batch), torch.randn(1, config.text_width)
    short = -(-max(len(c) for c in captions) // 8) * 8
    ours_text, reference_text = _padded(captions, short), _padded(captions, config.max_text_tokens)
    ids = [torch.randint(2, 32_000, (len(caption),)).tolist() for caption in captions]
    padded_ids = torch.tensor([[*row, *[0] * (config.max_text_tokens - len(row))] for row in ids])
    tokens = torch.randn(case.batch, N, config.token_channels)
    keys = sample_keys(0, case.first_sample + torch.arange(case.batch))
    draws = draw_training(config, keys, N)
    rows_BN = draw_training(config.model_copy(update={"order": "raster"}), keys, N)  # the same draws for every token
    losses: dict[str, float] = {}

    def ours() -> None:
        text = ours_text if t5 is None else _padded(t5.encode_ids(ids), short)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(tokens, *text, null, draws)
        _backward(model, out.loss_sum / out.count, losses, "ours")

    def plain() -> None:
        text, mask = reference_text
        if t5 is not None:
            with torch.no_grad():
                text = t5.model(input_ids=padded_ids, attention_mask=mask).last_hidden_state.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = reference.training_loss(model, tokens, text, mask, null, draws, rows_BN.times_RK, rows_BN.noise_RKC)
        _backward(model, loss, losses, "reference")

    measured = _interleaved(ours, plain, case.repeats)
    tolerance = 1e-3 if precision == "fp32" and t5 is None else 3e-2
    assert abs(losses["ours"] / losses["reference"] - 1) < tolerance, losses
    what = "training step" if t5 is None else "training step with T5 in it"
    return _row(f"{what}, {case.name}, {precision}, batch {case.batch}", *measured, "s", 1.5)


def _backward(model: FluidModel, loss: torch.Tensor, losses: dict[str, float], name: str) -> None:
    loss.backward()
    losses[name] = loss.item()
    for parameter in model.parameters():
        parameter.grad = None


def _generation(case: Case, precision: str) -> list[Row]:
    """Prompt states to tokens, without the encoders; and which part of it takes how long."""
    model = _model(case, precision).eval()
    if precision == "bf16":
        model.to(torch.bfloat16)
    config, N = model.config, model.config.num_tokens
    captions, null = _captions(case, case.images), torch.randn(1, config.text_width)
    given = torch.randn(case.images, N, config.token_channels)
    requests = []
    for i, text in enumerate(captions):
        request = GenerationRequest(
            text, null, i, case.num_steps, case.head_steps, 3.0, "constant", 1.0, "euler", (config.grid,) * 2
        )
        known = torch.ones(N, dtype=torch.bool)
        known[DecodeSlot(model, request).order_N[-case.new_tokens :]] = False
        some = {"known_tokens_NC": given[i], "known_mask_N": known} if bool(known.any()) else {}
        requests.append(replace(request, **some))
    slots = start_batch(model, requests)
    orders, noise = torch.stack([slot.order_N for slot in slots]), torch.stack([slot.noise_NC for slot in slots])
    tokens, known = torch.stack([slot.tokens_NC for slot in slots]), torch.stack([slot.known_N for slot in slots])
    counts = slots[0].counts
    results: dict[str, torch.Tensor] = {}
    parts = {"text: aligner, keys and values": 0.0, "trunk": 0.0, "head": 0.0, "the rest": 0.0}

    def ours() -> None:
        parts.update(dict.fromkeys(parts, 0.0))
        start = time.process_time()
        slots = start_batch(model, requests)
        parts["text: aligner, keys and values"] = time.process_time() - start
        for _ in counts:
            decode_step(model, slots)
        parts["the rest"] = time.process_time() - start - sum(parts.values())
        results["ours"] = torch.stack([slot.tokens_NC for slot in slots])

    def plain() -> None:
        results["reference"] = reference.generate(
            model, captions, null, tokens, known, orders, noise, counts, case.head_steps, 3.0, "euler"
        )

    for name, module in (("trunk", model.trunk), ("head", model.head)):

        def before(*_: Any, name: str = name) -> None:
            parts[name] -= time.process_time()

        def after(*_: Any, name: str = name) -> None:
            parts[name] += time.process_time()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    measured = _interleaved(ours, plain, case.repeats)
    if precision == "fp32":
        assert torch.allclose(results["ours"], results["reference"], atol=1e-3)
    with _one_thread():
        ours()  # once more: the reference calls the head too
    images = f"{case.images} image{'s' * (case.images > 1)}"
    what = f"{case.new_tokens} of {N} tokens in {case.num_steps} x {case.head_steps} steps, {images}"
    rows = [_row(f"generation, {case.name}, {precision}, {what}", *measured, "s", 3.0)]
    for name, seconds in parts.items():
        rows.append(_row(f"part of it: {name}, {case.name}, {precision}", 1000 * seconds, None, None, "ms", None))
    return rows


def _parts(case: Case, precisions: tuple[str, ...]) -> list[Row]:
    """Where a training step's CPU time goes (forward and backward of each part by itself)."""
    result = []
    for precision in precisions:
        model = _model(case, precision)
        config, N = model.config, model.config.num_tokens
        captions = _captions(case, case.batch)
        text, mask = _padded(captions, -(-max(len(c) for c in captions) // 8) * 8)
        keys = sample_keys(0, case.first_sample + torch.arange(case.batch))
        draws = draw_training(config, keys, N)
        tokens = torch.randn(case.batch, N, config.token_channels)
        packing = Packing(mask)
        aligned = torch.randn(len(packing.places_T), config.width)
        z = torch.randn(len(draws.rows_K), config.width, requires_grad=True)

        def trunk(model=model, tokens=tokens, draws=draws, text=(aligned, packing), config=config) -> torch.Tensor:
            return model.trunk(tokens, draws.mask_BN, (config.grid,) * 2, model.trunk.text_keys_values(*text), None).sum()

        def text_part(model=model, text=text, mask=mask) -> torch.Tensor:
            return model.aligner(text, mask)[0].sum()

        def head(model=model, draws=draws, z=z) -> torch.Tensor:
            return model.head(draws.noise_RKC, draws.times_RK * 1000, model.head.embed_condition(z)).sum()

        parts: dict[str, Callable[[], torch.Tensor]] = {"trunk": trunk, "text aligner": text_part, "head": head}
        for name, part in parts.items():

            def run(part: Callable[[], torch.Tensor] = part, precision: str = precision) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    out = part()
                out.float().backward()

            seconds = statistics.median(_seconds(run) for _ in range(case.repeats))
            result.append(
                _row(
                    f"part of a training step: {name}, {case.name}, {precision}, batch {case.batch}",
                    1000 * seconds,
                    None,
                    None,
                    "ms",
                    None,
                )
            )
    draw = statistics.median(_seconds(lambda: draw_training(config, keys, N)) for _ in range(case.repeats))
    result.append(
        _row(f"part of a training step: random draws, {case.name}, batch {case.batch}", 1000 * draw, None, None, "ms", None)
    )
    return result


def _attention(tokens: int, precision: str) -> Row:
    """Self-attention's forward and backward by plain matmuls (ours) and by the fused kernel, 4 heads of 64, 4096 tokens
    in all: what `attend` in fluid_core/model/layers.py chooses by."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    qkv = [torch.randn(4096 // tokens, 4, tokens, 64, dtype=dtype, requires_grad=True) for _ in range(3)]

    def plain() -> None:
        q, k, v = qkv
        torch.matmul((torch.matmul(q / 8.0, k.transpose(-1, -2))).softmax(-1), v).sum().backward()

    def fused() -> None:
        F.scaled_dot_product_attention(*qkv).sum().backward()

    ours, reference, ratio = _interleaved(plain, fused, 7)
    name = f"attention, {tokens} tokens, {precision}: matmuls against fused"
    return _row(name, 1000 * ours, 1000 * reference, ratio, "ms", None)


def _encoders(case: Case, dtype: str) -> list[Row]:
    """The frozen encoders that generation adds: T5 on one caption and the VAE's decoder (fp32) on one image."""
    from diffusers import AutoencoderKL

    from fluid_core.encoders.image import ImageTokenizer

    levels, config = len(case.vae["block_out_channels"]), ModelConfig(preset=case.name, **case.settings)
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    vae = ImageTokenizer(AutoencoderKL(**case.vae, **types, latent_channels=config.latent_channels), "kl")
    latents = torch.randn(1, config.latent_channels, *(config.grid * config.patch,) * 2)
    t5 = _t5(case, dtype)
    ids = [list(range(2, 2 + sum(case.caption_tokens) // 2))]
    parts: dict[str, Callable[[], Any]] = {
        f"VAE decode, {latents.shape[-1] * vae.stride} px": lambda: vae.decode(latents),
        f"T5, {len(ids[0])} tokens, {dtype}": lambda: t5.encode_ids(ids),
    }
    rows = []
    for name, run in parts.items():
        run()
        seconds = statistics.median(_seconds(run) for _ in range(case.repeats))
        rows.append(_row(f"part of an image: {name}, {case.name}", 1000 * seconds, None, None, "ms", None))
    return rows


def _row(name: str, ours: float, slow: float | None, ratio: float | None, unit: str, target: float | None) -> Row:
    plain, ratio = slow and round(slow, 4), ratio and round(ratio, 2)
    return {"name": name, "ours": round(ours, 4), "reference": plain, "ratio": ratio, "unit": unit, "target": target}


def _interleaved(ours: Callable[[], None], plain: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the pairs' ratios, which the machine's drift touches least."""
    with _one_thread():
        ours(), plain()
        pairs = [(_seconds(ours), _seconds(plain)) for _ in range(repeats)]
    fast, slow = zip(*pairs, strict=True)
    return statistics.median(fast), statistics.median(slow), statistics.median(b / a for a, b in pairs)


def _seconds(run: Callable[[], Any]) -> float:
    with _one_thread():
        start = time.process_time()
        run()
        return time.process_time() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    # CPU time of several threads counts their waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
