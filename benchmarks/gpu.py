"""The method on one GPU: achieved TFLOP/s and share of the bf16 peak, for each preset that fits in its memory.

    python -m benchmarks.run gpu                       all presets, about a quarter of an hour
    python -m benchmarks.gpu fluid-166m fluid-1.1b     some of them: a plain script that needs torch alone

Training is a whole step (forward, backward, AdamW) as the trainer computes it: fp32 weights, bf16 autocast, flow head in bf16, a
fixed number of masked tokens. Generation is prompt states to tokens with guidance, bf16 weights. Both without and with
`torch.compile`. The head's whole solver is timed with its kernels launched one by one and as one CUDA graph.

FLOPs are those of matrix products and attention: training's by `fluid_core.planning` (recomputation is not counted),
generation's counted by torch while it runs. Rows: ours = TFLOP/s, reference = the card's peak, ratio = share of peak.
"""

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.run import as_table
from fluid_core.config import PRESETS, ModelConfig
from fluid_core.diffusion.solvers import solve
from fluid_core.generation.engine import GenerationRequest, decode_step, start_batch
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.planning import forward_flops, peak_flops
from fluid_core.random import sample_keys
from fluid_core.training.engine import compile_blocks

Row = dict[str, Any]

SETTINGS: dict[str, Any] = {"objective": "flow", "head_precision": "bf16", "text_width": 1024, "masked_tokens_per_image": 164}
"""T5-large's width; 164 of 256 tokens is the mean of the cosine law."""
CAPTION_TOKENS = 40
TRAINING_BATCHES = (256, 128, 64, 32, 16, 8)  # the largest that fits is measured
IMAGES, NUM_STEPS, HEAD_STEPS = 64, 64, 25
CHECKPOINTED = 2e9  # parameters from which training recomputes activations


def rows(presets: list[str] | None = None) -> list[Row]:
    """Rows for the harness.

    Raises:
        ValueError: there is no CUDA device, or a preset is unknown.
    """
    if not torch.cuda.is_available():
        raise ValueError("benchmarks.gpu needs a CUDA device; `python -m benchmarks.run model` measures on CPU")
    device, result = torch.device("cuda"), []
    for name in presets or PRESETS:
        config = ModelConfig(preset=name, **SETTINGS)
        for part in (training_rows, generation_rows, head_rows):
            try:
                result += part(config, device)
            except torch.cuda.OutOfMemoryError:
                result.append(_row(f"{part.__name__.removesuffix('_rows')}, {name}: does not fit in memory", None, device))
            _free()
    return result


def training_rows(config: ModelConfig, device: torch.device, batches: tuple[int, ...] = TRAINING_BATCHES) -> list[Row]:
    """One row without and one with `torch.compile`, at the largest of `batches` that fits."""
    result = []
    for compiled in (False, True):
        for batch in batches:
            _free()
            try:
                seconds = _training_seconds(config, device, batch, compiled)
                break
            except torch.cuda.OutOfMemoryError:
                if batch == batches[-1]:
                    raise
        flops = 3 * batch * forward_flops(config, CAPTION_TOKENS)
        target = 0.5 if config.preset == "fluid-1.1b" else None
        name = f"training step, {config.preset}, batch {batch}, {_mode(compiled)}, {batch / seconds:.0f} images/s"
        result.append(_row(name, flops / seconds, device, target))
    return result


def _training_seconds(config: ModelConfig, device: torch.device, batch: int, compiled: bool) -> float:
    model = _model(config, device)
    model.trunk.activation_checkpointing = sum(p.numel() for p in model.parameters()) > CHECKPOINTED
    if compiled:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randn(batch, config.num_tokens, config.token_channels, device=device)
    text = torch.randn(batch, CAPTION_TOKENS, config.text_width, device=device)
    mask = torch.ones(batch, CAPTION_TOKENS, dtype=torch.bool, device=device)
    null = torch.randn(1, config.text_width, device=device)
    draws = draw_training(config, sample_keys(0, torch.arange(batch)), config.num_tokens).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens, text, mask, null, draws)
        (loss.loss_sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _seconds(step, device, warm_up=3, repeats=10)


def generation_rows(
    config: ModelConfig, device: torch.device, images: int = IMAGES, num_steps: int = NUM_STEPS, head_steps: int = HEAD_STEPS
) -> list[Row]:
    """One row without and one with `torch.compile`: `images` at once, guidance 3, Euler."""
    model = _model(config, device).to(torch.bfloat16).eval().requires_grad_(False)
    null, grid = torch.randn(1, config.text_width, device=device), (config.grid,) * 2
    requests = [
        GenerationRequest(
            torch.randn(CAPTION_TOKENS, config.text_width, device=device), null, seed, num_steps, head_steps, 3.0, "constant", 1.0,
            "euler", grid,
        )
        for seed in range(images)
    ]  # fmt: skip

    def generate() -> None:
        slots = start_batch(model, requests)
        while not slots[0].done:
            decode_step(model, slots)

    with FlopCounterMode(display=False) as counter:  # and the warm-up
        generate()
    result = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model)
        seconds = _seconds(generate, device, warm_up=int(compiled), repeats=2)
        what = f"{images} images, {num_steps} x {head_steps} steps, {_mode(compiled)}, {images / seconds:.1f} images/s"
        result.append(_row(f"generation, {config.preset}, {what}", counter.get_total_flops() / seconds, device))
    return result


def head_rows(config: ModelConfig, device: torch.device, images: int = IMAGES) -> list[Row]:
    """The solver of one generation step (4 tokens an image, both sides of guidance): kernel by kernel, and as one CUDA graph."""
    head = _model(config, device).head.to(torch.bfloat16).eval().requires_grad_(False)
    rows = 2 * 4 * images
    condition = head.embed_condition(torch.randn(rows, config.width, device=device))
    noise = torch.randn(rows, config.token_channels, device=device)

    def run() -> torch.Tensor:
        def predict(x: torch.Tensor, step: float) -> torch.Tensor:
            return head(x, torch.full((1,), step, device=device), condition)

        return solve(config.objective, "euler", predict, noise, HEAD_STEPS, 1.0, lambda i: noise)

    with FlopCounterMode(display=False) as counter:
        expected = run()
    name = f"head, {config.preset}, {rows} rows x {HEAD_STEPS} steps"
    seconds = _seconds(run, device, warm_up=3, repeats=20)
    result = [_row(f"{name}, kernel by kernel, {1000 * seconds:.2f} ms", counter.get_total_flops() / seconds, device)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture wants its kernels and workspaces to be there
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.testing.assert_close(captured, expected, atol=2e-2, rtol=2e-2)
    seconds = _seconds(graph.replay, device, warm_up=3, repeats=20)
    return [*result, _row(f"{name}, CUDA graph, {1000 * seconds:.2f} ms", counter.get_total_flops() / seconds, device)]


def _model(config: ModelConfig, device: torch.device) -> FluidModel:
    torch.manual_seed(0)
    with torch.device(device):
        model = FluidModel(config)
    for parameter in model.head.parameters():  # an untrained head is all zeros: give it something to compute
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _mode(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def _seconds(run: Callable[[], Any], device: torch.device, warm_up: int, repeats: int) -> float:
    for _ in range(warm_up):
        run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(name: str, flops_per_second: float | None, device: torch.device, target: float | None = None) -> Row:
    peak = peak_flops(device)
    share = round(flops_per_second / peak, 3) if flops_per_second and peak else None
    ours = float(f"{flops_per_second / 1e12:.4g}") if flops_per_second else None
    reference = round(peak / 1e12) if peak else None
    return {"name": name, "ours": ours, "reference": reference, "ratio": share, "unit": "TFLOP/s", "target": target}


if __name__ == "__main__":
    print(as_table(rows(sys.argv[1:])))
