"""Serving: HTTP images a second against the offline FluidPipeline at the same batch size, and the latency that HTTP adds.

    python -m benchmarks.run serve

The demo's model, encoders and sampler with random weights, one thread a process. Both sides alternate, and each served round is
compared with the mean of the offline ones before and after it; the ratio is the median: the machine's speed changes all the time.
A request costs some 20 ms of CPU whatever the model (client, proxy, gateway and replica share the machine's cores), half of what
an image of the demo's model does. So throughput is measured with the paper's smallest preset too, in 8 x 8 tokens and few steps.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from fluid_core.config import ImageTokenizerConfig, Recipe, StandInT5Config, TokenizerTrainingConfig, load_recipe
from fluid_core.encoders.autoencoder import build_tokenizer
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.stand_in import create_stand_in_t5
from fluid_core.encoders.text import TextEncoder
from fluid_core.entry import ray_session
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.model.fluid import FluidModel

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH = 16
ROUNDS = {"the demo's model": 15, "fluid-166m": 4}
ALONE = 40
MODELS: dict[str, dict[str, Any]] = {  # what changes in the demo's recipe
    "the demo's model": {},
    "fluid-166m": {"preset": "fluid-166m", "width": 0, "aligner_blocks": 0, "grid": 8},
}
PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue", "white") for shape in ("circle", "square", "star", "heart")
]
Row = dict[str, Any]


def rows() -> list[Row]:
    """Measurements for `make bench`: dicts of name, ours, reference, ratio, unit, target."""
    from fluid_core.serving.app import serving

    torch.set_num_threads(1)
    found: list[Row] = []
    for name, model in MODELS.items():
        batch = BATCH if not model else BATCH // 4
        with tempfile.TemporaryDirectory(prefix="fluid-bench-") as folder, ray_session(num_cpus=4, serves=True):
            recipe = _recipe(Path(folder), model, batch)
            pipeline = FluidPipeline.from_pretrained(recipe.serving.model or "")
            limits = httpx.Limits(max_connections=4 * BATCH)
            with serving(recipe) as (url, _), httpx.Client(timeout=600, limits=limits) as client:
                found.append(_throughput(name, pipeline, url, client, 1, batch, ROUNDS[name]))
                if not model:
                    found.append(_throughput(f"{name}, 4 images a request", pipeline, url, client, 4, batch, ROUNDS[name]))
                    found += _latency(pipeline, url, client)
    return found


def _throughput(name: str, pipeline: FluidPipeline, url: str, client: httpx.Client, each: int, batch: int, rounds: int) -> Row:
    """Saturation: more images waiting than there are places in the batch. The first two batches, in which requests that come one by
    one fall into step, and the last, which empties the server, are not counted."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(6 * batch)]

    def offline(seed: int) -> float:
        started = time.monotonic()
        pipeline(prompts[: 3 * batch], seed=seed, batch_size=batch)
        return 3 * batch / (time.monotonic() - started)

    def served(pool: ThreadPoolExecutor, seed: int) -> float:
        bodies = [{"prompt": prompts[i], "seed": seed + i, "n": each} for i in range(0, len(prompts), each)]
        ends = sorted(pool.map(lambda body: _ask(client, url, body), bodies))
        return 3 * batch / (ends[5 * batch // each] - ends[2 * batch // each])

    with ThreadPoolExecutor(3 * batch // each) as pool:
        ours, references = _paired(lambda seed: served(pool, seed), offline, rounds)
    ratio = statistics.median(a / b for a, b in zip(ours, references, strict=True))
    name = f"serving throughput, batch {batch}, {name}"
    return _row(name, statistics.median(ours), statistics.median(references), ratio, "images/s", ">= 0.95 x offline")


def _paired(served: Callable[[int], float], offline: Callable[[int], float], rounds: int) -> tuple[list[float], list[float]]:
    """The served figures, and for each the mean of the offline ones before and after it. The first of each warms up."""
    served(0)
    offline(0)
    ours, references = [], []
    before = offline(1000)
    for seed in range(1000, 1000 * (rounds + 1), 1000):
        ours.append(served(seed))
        after = offline(seed)
        references.append((before + after) / 2)
        before = after
    return ours, references


def _latency(pipeline: FluidPipeline, url: str, client: httpx.Client) -> list[Row]:
    """One request at a time, each compared with the offline ones before and after it. The difference counts, not the ratio."""

    def offline(seed: int) -> float:
        started = time.monotonic()
        pipeline(PROMPTS[:1], seed=seed)
        return 1000 * (time.monotonic() - started)

    def served(seed: int) -> float:
        started = time.monotonic()
        return 1000 * (_ask(client, url, {"prompt": PROMPTS[0], "seed": seed}) - started)

    ours, references = _paired(served, offline, ALONE)
    latency, reference = statistics.median(ours), statistics.median(references)
    added = statistics.median(a - b for a, b in zip(ours, references, strict=True))
    return [
        _row("serving latency, batch 1, p50", latency, reference, latency / reference, "ms", ""),
        _row("serving latency added, batch 1, p50", added, 0.0, None, "ms", "< 30 ms"),
    ]


def _ask(client: httpx.Client, url: str, body: dict[str, Any]) -> float:
    """One request; the time at which its answer was there."""
    answer = client.post(f"{url}/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    return time.monotonic()


def _row(name: str, ours: float, reference: float, ratio: float | None, unit: str, target: str) -> Row:
    return {"name": name, "ours": ours, "reference": reference, "ratio": ratio, "unit": unit, "target": target}


def _recipe(folder: Path, model: dict[str, Any], batch: int) -> Recipe:
    """The demo's recipe with a bundle of random weights to serve, and with what `model` changes."""
    values = yaml.safe_load((REPOSITORY / "configs/demo.yaml").read_text())
    values["runs_dir"] = str(folder / "runs")
    values["serving"] = {
        "port": 0, "model": str(folder / "bundle"), "max_batch_size": batch, "max_queued": 8 * batch, "cpus_per_replica": 1,
    }  # fmt: skip
    values["model"].update(model)
    if model:
        values["data"]["image_size"] *= model["grid"] // 4
        values["generation"]["num_steps"] = 4
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(folder / "recipe.yaml")
    torch.manual_seed(0)
    train = TokenizerTrainingConfig(**(values["image_tokenizer"].get("train") or {}))
    model = build_tokenizer(ImageTokenizerConfig(path="unused", kind="kl", train=train), recipe.data.image_size)
    create = recipe.text_encoder.create or StandInT5Config()
    create_stand_in_t5(Counter(" ".join(PROMPTS).split()), create, folder / "t5", 0)
    text = TextEncoder.from_pretrained(folder / "t5", max_tokens=recipe.text_encoder.max_tokens, dtype="fp32")
    channels = recipe.model.latent_channels
    pipeline = FluidPipeline(
        FluidModel(recipe.model), ImageTokenizer(model, "kl"), text, recipe.generation, [0.0] * channels, [1.0] * channels
    )
    pipeline.save_pretrained(folder / "bundle")
    return recipe
