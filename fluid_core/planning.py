"""Arithmetic of a training run: FLOPs, memory, time, cost. Nothing is built or run here.

Shapes: N image tokens, L text tokens, E text width, D trunk width, W head width, C token channels, K masked tokens, R timesteps.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fluid_core.config import ModelConfig, Recipe, TrainingConfig

TIME_CHANNELS = 256
PERSISTENT_MODEL = 50_000_000
"""Below this many parameters ZeRO-3 gathers the whole model once a step instead of module by module: at such sizes the
bookkeeping of a gather costs more than the bytes."""
BUCKET, PREFETCH, SUB_GROUP = 100_000_000, 50_000_000, 1_000_000_000
"""ZeRO's reduce bucket, prefetch bucket and optimizer sub-group, in elements."""


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 peak (FLOP/s), memory (bytes), and a rough price of an hour in USD (on demand, large clouds, 2025)."""

    peak: float
    memory: float
    usd_per_hour: float


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(312e12, 40e9, 1.8),
    "a100": Gpu(312e12, 80e9, 2.0),
    "h100": Gpu(989e12, 80e9, 3.0),
    "h200": Gpu(989e12, 141e9, 3.7),
    "b200": Gpu(2250e12, 192e9, 5.5),
    "l40s": Gpu(362e12, 48e9, 1.2),
}


def mean_masked_tokens(model: ModelConfig) -> float:
    """Expected number of tokens an image gives to the head."""
    if model.order == "raster":
        return float(model.num_tokens)
    if model.masked_tokens_per_image is not None:
        return float(min(model.masked_tokens_per_image, model.num_tokens))
    if model.mask_law == "cosine":
        return 2 / math.pi * model.num_tokens
    # Mean of N(1, 0.25) cut to [0.7, 1].
    low = (0.7 - 1.0) / 0.25
    phi = math.exp(-(low**2) / 2) / math.sqrt(2 * math.pi)
    inside = 0.5 - 0.5 * (1 + math.erf(low / math.sqrt(2)))
    return (1.0 + 0.25 * (phi - 1 / math.sqrt(2 * math.pi)) / inside) * model.num_tokens


def head_outputs(model: ModelConfig) -> int:
    """Output channels of the diffusion head: noise and the variance's logits for eps, else one value a channel."""
    return model.token_channels * (2 if model.objective == "eps" else 1)


def forward_flops(model: ModelConfig, text_tokens: float | None = None, masked_tokens: float | None = None) -> float:
    """Matrix-multiplication FLOPs (2 a multiply-add) of one image's training forward pass, checked against torch's counter."""
    N, D, C, R = model.num_tokens, model.width, model.token_channels, model.timesteps_per_token
    L = model.max_text_tokens if text_tokens is None else text_tokens
    K = mean_masked_tokens(model) if masked_tokens is None else masked_tokens
    aligner = 2 * L * model.text_width * D + model.aligner_blocks * (8 * L * D**2 + 4 * L**2 * D + 16 * L * D**2)
    block = 8 * N * D**2 + 4 * N**2 * D + 4 * N * D**2 + 4 * L * D**2 + 4 * N * L * D + 16 * N * D**2
    trunk = (2 * N * C * D if model.tokens == "continuous" else 0) + model.blocks * block
    if model.tokens == "discrete":
        return aligner + trunk + 2 * K * D**2 + 2 * K * D * model.codebook_size
    W = model.head_width
    draw = 2 * TIME_CHANNELS * W + 2 * W**2 + 2 * C * W + model.head_blocks * 10 * W**2 + 4 * W**2 + 2 * W * head_outputs(model)
    return aligner + trunk + 2 * K * D * W + K * R * draw


def training_flops(model: ModelConfig, text_tokens: float | None = None) -> float:
    """Model FLOPs of one image's forward and backward pass: three forwards. Recomputation is not counted (MFU's convention)."""
    return 3 * forward_flops(model, text_tokens)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of this GPU by its name; None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    for key, gpu in sorted(GPUS.items(), key=lambda item: -len(item[0])):
        if key.split("-")[0] in name:
            return gpu.peak
    return None


@dataclass(frozen=True)
class Parameters:
    """How many of a model's parameters are Muon's, and how many there are."""

    total: int
    muon: int


def count_parameters(model: ModelConfig, training: TrainingConfig) -> Parameters:
    """From the model itself, built without memory on the meta device."""
    from fluid_core.model.fluid import FluidModel
    from fluid_core.muon import hidden_matrices

    with torch.device("meta"):
        built = FluidModel(model)
    muon = sum(p.numel() for _, p in hidden_matrices(built)) if training.optimizer == "muon" else 0
    return Parameters(sum(p.numel() for p in built.parameters()), muon)


def activation_bytes(model: ModelConfig, training: TrainingConfig, micro_batch: int) -> int:
    """What autograd keeps for the backward pass of one micro-batch, by running the forward pass on tensors without data.

    Weights that autograd keeps are not counted under ZeRO-3, which takes them away; bf16 copies that autocast makes of them
    are counted in the other stages. Of compiled blocks COMPILED of the activations are counted.
    """
    bf16 = training.precision != "fp32"
    per_image, copies = _kept(model.model_dump_json(), training.activation_checkpointing, bf16, training.compile)
    if training.activation_checkpointing:  # one block is recomputed at a time
        shallow = (model.model_copy(update={"blocks": blocks}).model_dump_json() for blocks in (1, 0))
        one, none = (_kept(variant, False, bf16, training.compile) for variant in shallow)
        per_image, copies = per_image + one[0] - none[0], copies + one[1] - none[1]
    if training.compile:
        per_image *= COMPILED
    return int(per_image * micro_batch + (copies if training.zero_stage < 3 else 0))


COMPILED = 0.925
"""Share of what autograd keeps of separate operations that it keeps of compiled blocks: the compiler computes some of it twice
instead. Measured on an H200 for 369M, 1.1B and 3.1B: .923 to .925 (docs/training.md)."""


@functools.lru_cache(maxsize=64)
def _kept(model_json: str, checkpointing: bool, bf16: bool, compiled: bool) -> tuple[float, int]:
    """Bytes that autograd keeps: (of an image's activations, of the weights' bf16 copies)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fluid_core.model.draws import TrainingDraws
    from fluid_core.model.fluid import FluidModel

    # The eps objective's noise schedule is cached for the process: it must not be made of tensors without data.
    model = ModelConfig.model_construct(**{**json.loads(model_json), "objective": "flow"})  # 0 blocks mean none here
    B, N, L, C = 2, model.num_tokens, model.max_text_tokens, model.token_channels
    K, R = round(B * mean_masked_tokens(model)), model.timesteps_per_token
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        built = FluidModel(model)
        built.trunk.activation_checkpointing, built.trunk.half_residuals = checkpointing, compiled
        weights = {p.untyped_storage()._cdata for p in built.parameters()}
        shapes = {tuple(p.shape) for p in built.parameters() if p.ndim == 2}
        shapes |= {shape[::-1] for shape in shapes}
        continuous = model.tokens == "continuous"
        tokens = torch.empty(B, N, C) if continuous else torch.zeros(B, N, dtype=torch.int64)
        draws = TrainingDraws(
            mask_BN=torch.ones(B, N, dtype=torch.bool), mask_ratio_B=torch.ones(B), order_BN=torch.zeros(B, N, dtype=torch.int64),
            drop_text_B=torch.zeros(B, dtype=torch.bool), rows_K=torch.zeros(K, dtype=torch.int64), weights_K=torch.ones(K),
            times_RK=torch.ones(R, K), noise_RKC=torch.ones(R, K, C), count=K,
        )  # fmt: skip
        text, mask = torch.empty(B, L, model.text_width), torch.ones(B, L, dtype=torch.bool)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            built(tokens, text, mask, torch.empty(1, model.text_width), draws)
        activations, copies = 0, 0
        for storage, tensor in kept.items():
            size = tensor.untyped_storage().nbytes()
            if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
                copies += size
            elif storage not in weights:
                activations += size
    return activations / B, copies


_T5_V1_1 = {512: (8, 6, 1024), 768: (12, 12, 2048), 1024: (24, 16, 2816), 2048: (24, 32, 5120), 4096: (24, 64, 10240)}
"""Layers, heads and feed-forward width of T5 v1.1's encoders (small, base, large, xl, xxl) by their width."""
T5_TOKENS_PER_BATCH = 8192
"""Text tokens that the frozen encoder takes at a time."""


def text_encoder_bytes(recipe: Recipe, micro_batch: int) -> tuple[int, int]:
    """(weights, working memory) of the frozen T5 that encodes captions in each worker; nothing with stored embeddings.

    Its shape is that of the folder `text_encoder.path`, or of T5 v1.1 of the model's text width for a hub id.

    Raises:
        ValueError: neither is known.
    """
    if recipe.encode.text.mode == "embeddings":
        return 0, 0
    section, width = recipe.text_encoder, recipe.model.text_width
    file = Path(section.path) / "config.json"
    if file.is_file():
        c = json.loads(file.read_text())
        layers, heads, feed, vocabulary = c["num_layers"], c["num_heads"], c["d_ff"], c["vocab_size"]
        inner, matrices = heads * c["d_kv"], 3 if c["feed_forward_proj"].startswith("gated") else 2
    elif width in _T5_V1_1:
        layers, heads, feed = _T5_V1_1[width]
        inner, matrices, vocabulary = heads * 64, 3, 32128
    else:
        raise ValueError(f"the size of text_encoder.path {section.path} is not known here: give a folder to plan with")
    element = 2 if section.dtype == "bf16" else 4
    layer = 4 * width * inner + matrices * width * feed + 2 * width
    parameters = vocabulary * width + layers * layer + 32 * heads + width
    tokens = min(T5_TOKENS_PER_BATCH, micro_batch * section.max_tokens)
    # Per token: the residual, and the larger of a feed-forward and of an attention with its scores, whose softmax is fp32.
    feed_forward = element * (width + matrices * feed)
    attention = element * 3 * inner + heads * section.max_tokens * (element + 8)
    working = tokens * (element * width + max(feed_forward, attention))
    return parameters * element, working


def memory_per_gpu(
    model: ModelConfig,
    training: TrainingConfig,
    gpus: int,
    parameters: Parameters | None = None,
    text_encoder: float = 0.0,
) -> dict[str, float]:
    """Bytes on one GPU by kind: parameters (whole, or pieces and what is gathered), gradients, optimizer with its fp32 masters, EMA,
    activations, and what the exchange of gradients needs beyond them.

    What `offload_optimizer` moves to the host is under `host`.

    Args:
        text_encoder: bytes of a text encoder in the worker (`text_encoder_bytes`), whole on each GPU.
    """
    p = parameters or count_parameters(model, training)
    share = 1 / gpus
    stage = training.zero_stage
    micro = training.micro_batch(gpus)
    states = (8 * (p.total - p.muon) + 4 * p.muon) * (share if stage else 1)
    # ZeRO keeps fp32 masters beside the fp32 parameters that the model computes with.
    masters = 4 * p.total * share if stage else 0.0
    gradients = 4 * p.total * (1 if stage < 2 else share)
    ema = 4 * p.total * (share if stage else 1)
    largest = 16 * model.width**2 + 20 * model.width
    gathered = 0.0 if stage < 3 else 4.0 * (p.total if p.total < PERSISTENT_MODEL else min(p.total, PREFETCH + 2 * largest))
    activations = float(activation_bytes(model, training, micro))
    # Gradients are exchanged a bucket at a time, from a flat copy. By then that share of the backward pass is done, and of the
    # activations gone.
    bucket = min(p.total, BUCKET)
    exchange = 4.0 * bucket * (1 if stage < 2 else 2)
    out = {
        "parameters": 4 * p.total * (share if stage == 3 else 1) + gathered,
        "gradients": gradients,
        "optimizer": states + masters,
        "ema": ema,
        "communication": max(0.0, exchange - activations * bucket / p.total),
        "activations": activations,
    }
    if text_encoder:
        out["text_encoder"] = text_encoder
    if training.offload_optimizer:
        # Optimizer states, their masters, gradients in fp32, and the EMA that follows them.
        out["host"] = states + masters + ema + 4 * p.total * share
        out["optimizer"], out["ema"] = 0.0, 0.0
    return out


@dataclass(frozen=True)
class Plan:
    """What `fluid plan` prints."""

    parameters: int
    memory_per_gpu_gib: dict[str, float]
    gpu_memory_gib: float
    checkpoint_gib: float
    checkpoint_seconds: float
    images_per_second: float
    days: float
    cost_usd: float
    fits: bool
    advice: str


FULL = 0.92
"""Share of a GPU's memory that a plan may fill: the rest is the CUDA context, workspaces and fragmentation."""


def plan(
    model: ModelConfig,
    training: TrainingConfig,
    gpus: int,
    gpu: str,
    mfu: float,
    samples: float,
    node_write_gbps: float,
    usd_per_hour: float | None = None,
    text_encoder: float = 0.0,
) -> Plan:
    """Memory, time and cost of `samples` images on `gpus` GPUs of a kind.

    Args:
        mfu: model FLOPs utilisation to assume; measure yours with a short run.
        node_write_gbps: GB/s that a node of 8 GPUs writes checkpoints with.
        text_encoder: as in `memory_per_gpu`. Its time is not counted.
    """
    if gpu not in GPUS:
        raise ValueError(f"unknown gpu {gpu!r}; one of {', '.join(GPUS)}")
    if training.batch_size % gpus:
        raise ValueError(f"training.batch_size {training.batch_size} is not a multiple of {gpus} GPUs")
    kind = GPUS[gpu]
    p = count_parameters(model, training)
    memory = memory_per_gpu(model, training, gpus, p, text_encoder)
    rate = kind.peak * mfu * gpus / training_flops(model)
    days = samples / rate / 86400
    on_gpu = sum(v for k, v in memory.items() if k != "host")
    fits = on_gpu <= FULL * kind.memory
    checkpoint = 4 * p.total + 4 * p.total + 8 * (p.total - p.muon) + 4 * p.muon
    return Plan(
        parameters=p.total,
        memory_per_gpu_gib={k: round(v / 2**30, 3) for k, v in memory.items()} | {"total": round(on_gpu / 2**30, 3)},
        gpu_memory_gib=round(kind.memory / 2**30, 1),
        checkpoint_gib=round(checkpoint / 2**30, 2),
        checkpoint_seconds=round(checkpoint / (math.ceil(gpus / 8) * node_write_gbps * 1e9), 1),
        images_per_second=round(rate, 1),
        days=round(days, 2),
        cost_usd=round(days * 24 * gpus * (kind.usd_per_hour if usd_per_hour is None else usd_per_hour)),
        fits=fits,
        advice="" if fits else _advice(model, training, gpus, kind, p, text_encoder),
    )


def variants(training: TrainingConfig) -> list[TrainingConfig]:
    """The same run with other ZeRO stages, activation checkpointing and offload, cheapest in time first. Stage 3 is not compiled."""
    out = []
    for checkpointing in (False, True):
        for stage in (0, 1, 2, 3):
            for offload in (False, True):
                if stage or not offload:
                    change = {"zero_stage": stage, "activation_checkpointing": checkpointing, "offload_optimizer": offload}
                    out.append(training.model_copy(update=change | {"compile": training.compile and stage < 3}))
    return out


def _advice(model: ModelConfig, training: TrainingConfig, gpus: int, kind: Gpu, p: Parameters, text_encoder: float) -> str:
    def fits(candidate: TrainingConfig, number: int = gpus) -> bool:
        memory = memory_per_gpu(model, candidate, number, p, text_encoder)
        return sum(v for k, v in memory.items() if k != "host") <= FULL * kind.memory

    micro = training.micro_batch(gpus)
    steps: list[tuple[str, dict[str, object]]] = [
        (
            "training.zero_stage: 3" + (", training.compile: false" if training.compile else ""),
            {"zero_stage": 3, "compile": False},
        ),
        ("training.activation_checkpointing: true", {"activation_checkpointing": True}),
    ]
    while micro > 1:
        micro //= 2
        steps.append((f"training.micro_batch_size: {micro}", {"micro_batch_size": micro}))
    steps.append(("training.offload_optimizer: true", {"offload_optimizer": True}))
    changes: dict[str, object] = {}
    said: dict[str, str] = {}
    for text, change in steps:
        key = next(iter(change))
        if getattr(training, key) == change[key]:
            continue
        changes |= change
        said[key] = text
        if fits(training.model_copy(update=changes)):
            return "does not fit; set " + ", ".join(said.values())
    more = gpus
    while more < 4096:
        more *= 2
        if training.batch_size % more == 0 and fits(training.model_copy(update=changes), more):
            first = f"set {', '.join(said.values())} and " if said else ""
            return f"does not fit on {gpus}; {first}use {more} GPUs"
    return "does not fit on any number of these GPUs: use GPUs with more memory or a smaller model"
