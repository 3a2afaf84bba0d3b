"""One large preset trained for some steps on GPUs: model TFLOP/s, tokens/s, memory beside the planner's. Prints a line of JSON.

    torchrun --nproc-per-node 1 -m benchmarks.train_gpu fluid-1.1b --checkpointing
    torchrun --nproc-per-node 8 -m benchmarks.train_gpu fluid-3.1b
    torchrun --nproc-per-node 1 -m benchmarks.train_gpu fluid-10.5b --checkpointing --bf16-states --micro-batch 32 --steps 3

The engine is the trainer's: ZeRO (stage 3 unless told otherwise), bf16 compute, fp32 masters and moments, EMA, fused AdamW. With `--bf16-states` it is a plain
loop instead, in which weights, gradients, moments and EMA are all bf16: 10 bytes a parameter, so that 10.5B fit on one GPU of
139 GiB with little to spare. The data is random; latents are 16x16 tokens, captions have 128 tokens of width 4096.
"""

import argparse
import json
import time
from typing import Any

import torch

from fluid_core.config import ModelConfig, TrainingConfig
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.planning import FULL, count_parameters, memory_per_gpu, peak_flops, training_flops
from fluid_core.training.ema import ShardedEMA
from fluid_core.training.engine import Engine, device, quiet
from fluid_core.training.native import without_extensions

WARM_UP = 3


def main() -> None:
    args = parse()
    import deepspeed

    quiet()
    on = device()
    if on.type == "cuda":
        torch.cuda.set_device(on)
    else:  # to see that the script runs; it measures nothing there
        without_extensions()
    deepspeed.init_distributed("nccl" if on.type == "cuda" else "gloo")
    result = measure(args, on)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--offload", action="store_true", help="optimizer states and EMA in the host's memory")
    parser.add_argument("--bf16-states", action="store_true", help="a plain loop on one GPU in which everything is bf16")
    parser.add_argument("--zero-stage", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks (ZeRO stages 0 to 2)")
    parser.add_argument("--objective", choices=("flow", "eps"), default="flow", help="eps: the paper's, with an fp32 head")
    parser.add_argument("--micro-batch", type=int, default=None, help="default: the largest power of two that the plan fits")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step; the paper's batch of 2048 has many")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def measure(args: argparse.Namespace, on: torch.device) -> dict[str, Any]:
    """One row: what was trained, how fast, in how much memory."""
    world = torch.distributed.get_world_size()
    precision = "bf16" if args.objective == "flow" else "fp32"
    model = ModelConfig(
        preset=args.preset, text_width=4096, max_text_tokens=128, objective=args.objective, head_precision=precision
    )
    micro = args.micro_batch or largest_micro_batch(model, training(args, world, 1), on)
    batches = [_batch(model, micro, seed, on) for seed in range(2)]
    step, planned = (
        plain_step(model, on, args.checkpointing) if args.bf16_states else engine_step(model, training(args, world, micro))
    )
    seconds = []
    for _ in range(WARM_UP + args.steps):
        started = time.monotonic()
        loss = step([batches[i % 2] for i in range(args.accumulation)])  # waits for the GPU, as it returns the loss
        seconds.append(time.monotonic() - started)
    mean = sum(seconds[WARM_UP:]) / args.steps
    images, peak = micro * args.accumulation * world / mean, peak_flops(on)
    tflops = training_flops(model) * images / world / 1e12
    return {
        "preset": args.preset, "gpus": world, "micro_batch": micro, "accumulation": args.accumulation, "checkpointing": args.checkpointing,
        "zero_stage": None if args.bf16_states else args.zero_stage, "compiled": args.compile, "objective": args.objective,
        "optimizer_steps": WARM_UP + args.steps, "loss": loss, "seconds_per_step": mean, "images_per_second": images,
        "tokens_per_second": images * model.num_tokens, "tflops": tflops, "peak_tflops": peak / 1e12 if peak else None,
        "mfu": 1e12 * tflops / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated(on) / 2**30 if on.type == "cuda" else None,
        "planned_gib": planned / 2**30 if planned else None,
    }  # fmt: skip


def training(args: argparse.Namespace, world: int, micro: int) -> TrainingConfig:
    """ZeRO over all workers."""
    return TrainingConfig(
        batch_size=micro * args.accumulation * world, workers=world, micro_batch_size=micro, activation_checkpointing=args.checkpointing,
        offload_optimizer=args.offload, warmup_steps=0, zero_stage=args.zero_stage, compile=args.compile,
    )  # fmt: skip


def planned_bytes(model: ModelConfig, config: TrainingConfig) -> float:
    """What `fluid plan` expects on one GPU."""
    memory = memory_per_gpu(model, config, config.workers)
    return sum(value for kind, value in memory.items() if kind != "host")


def largest_micro_batch(model: ModelConfig, config: TrainingConfig, on: torch.device) -> int:
    """The largest power of two up to 256 that the plan fits into this GPU; 1 when none does."""
    if on.type != "cuda":
        return 2
    room = FULL * torch.cuda.get_device_properties(on).total_memory
    fitting = [1]
    for micro in (2, 4, 8, 16, 32, 64, 128, 256):
        change = {"micro_batch_size": micro, "batch_size": micro * config.workers}
        if planned_bytes(model, config.model_copy(update=change)) <= room:
            fitting.append(micro)
    return fitting[-1]


def engine_step(model: ModelConfig, config: TrainingConfig) -> tuple[Any, float]:
    """(one step of the trainer's engine, bytes that the plan expects)."""
    engine = Engine(model, config, seed=0)
    ema = ShardedEMA(engine.partitions, config.ema_decay)
    engine.set_learning_rate(1.0)

    def step(batches: list[tuple[Any, ...]]) -> float:
        for batch in batches:
            out = engine.forward(*batch)
            engine.backward(out.loss_sum / (out.count * len(batches)))
            engine.step()
        ema.update()
        return float(out.loss_sum.detach() / out.count)

    return step, planned_bytes(model, config)


def plain_step(model: ModelConfig, on: torch.device, checkpointing: bool) -> tuple[Any, float]:
    """(one step with every state in bf16, 0: the planner has no such setting)."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with on:
        built = FluidModel(model)
    torch.set_default_dtype(before)
    built.trunk.activation_checkpointing = checkpointing
    assert count_parameters(model, TrainingConfig()).total == sum(p.numel() for p in built.parameters())
    parameters = list(built.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, fused=True)

    def step(batches: list[tuple[Any, ...]]) -> float:
        for batch in batches:
            with torch.autocast(on.type, torch.bfloat16):
                out = built(*batch)
            loss = out.loss_sum / out.count
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1e-4)
        return float(loss.detach())

    return step, 0.0


def _batch(model: ModelConfig, micro: int, seed: int, on: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(micro, model.num_tokens, model.token_channels, generator=generator)
    text = torch.randn(micro, model.max_text_tokens, model.text_width, generator=generator).bfloat16()
    mask = torch.ones(micro, model.max_text_tokens, dtype=torch.bool)
    draws = draw_training(model, torch.arange(micro) + seed * micro, model.num_tokens)
    return tokens.to(on), text.to(on), mask.to(on), text[0].to(on), draws.to(on)


if __name__ == "__main__":
    main()
