"""Memory, time and cost of a training run, before it starts.

    fluid plan --config configs/fluid-10b.yaml --gpus 64 --gpu h100
    fluid plan --config configs/fluid-3b.yaml --gpus 8 --gpu h100 --what-if

Exits with 1 when the run does not fit, saying what to change.
"""

import argparse
import json
import math
from dataclasses import asdict

from fluid_core.config import load_recipe
from fluid_core.planning import GPUS, plan, text_encoder_bytes, variants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--mfu", type=float, default=0.35, help="model FLOPs utilisation to assume (default 0.35)")
    parser.add_argument("--samples", type=float, default=None, help="images to train on; default: max_steps x batch_size")
    parser.add_argument("--write", type=float, default=1.0, metavar="GB/S", help="checkpoint writing speed of a node of 8 GPUs")
    parser.add_argument(
        "--usd", type=float, default=None, metavar="USD", help="price of a GPU hour; default: a rough list price"
    )
    parser.add_argument("--what-if", action="store_true", help="compare ZeRO stages, activation checkpointing and offload")
    parser.add_argument("--json", action="store_true")


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError with the option whose number is out of its range; NaN is out of all."""
    for option, value, fits, wanted in (
        ("--gpus", args.gpus, args.gpus >= 1, "at least 1"),
        ("--mfu", args.mfu, 0 < args.mfu <= 1, "above 0 and at most 1"),
        ("--samples", args.samples, args.samples is None or 0 < args.samples < math.inf, "above 0"),
        ("--write", args.write, 0 < args.write < math.inf, "above 0"),
        ("--usd", args.usd, args.usd is None or 0 <= args.usd < math.inf, "0 or above"),
    ):
        if not fits:
            raise ValueError(f"{option} {value:g}: give a number that is {wanted}")


def run(args: argparse.Namespace) -> int:
    _check(args)
    recipe = load_recipe(args.config, [*args.overrides, f"training.workers={args.gpus}"])
    training = recipe.training
    samples = float(training.max_steps * training.batch_size) if args.samples is None else args.samples
    micro = training.micro_batch(args.gpus)
    text_encoder = float(sum(text_encoder_bytes(recipe, micro)))
    assumed = (args.mfu, samples, args.write, args.usd, text_encoder)
    result = plan(recipe.model, training, args.gpus, args.gpu, *assumed)
    if args.what_if:
        rows = []
        for variant in variants(training):
            p = plan(recipe.model, variant, args.gpus, args.gpu, *assumed)
            rows.append(
                {
                    "zero_stage": variant.zero_stage,
                    "activation_checkpointing": variant.activation_checkpointing,
                    "offload_optimizer": variant.offload_optimizer,
                    "compile": variant.compile,
                    "memory_gib": p.memory_per_gpu_gib["total"],
                    "fits": p.fits,
                }
            )
        if args.json:
            print(json.dumps(rows, indent=2))
        else:
            print(
                f"{'ZeRO stage':>10}  {'checkpointing':>13}  {'offload':>7}  {'compile':>7}  {'GiB a GPU':>10}  "
                f"fits in {result.gpu_memory_gib} GiB"
            )
            for row in rows:
                print(
                    f"{row['zero_stage']:>10}  {row['activation_checkpointing']!s:>13}  {row['offload_optimizer']!s:>7}"
                    f"  {row['compile']!s:>7}  {row['memory_gib']:>10.2f}  {'yes' if row['fits'] else 'no'}"
                )
        return 0
    if args.json:
        print(json.dumps(asdict(result), indent=2))
        return 0 if result.fits else 1
    print(f"{recipe.name}: {result.parameters / 1e9:.3f}B parameters on {args.gpus} x {args.gpu}, ZeRO-{training.zero_stage}")
    for kind, gib in result.memory_per_gpu_gib.items():
        print(
            f"  {kind:<14} {gib:>9.2f} GiB"
            + (" (on the host)" if kind == "host" else f" of {result.gpu_memory_gib}" if kind == "total" else "")
        )
    print(
        f"  checkpoint     {result.checkpoint_gib:>9.2f} GiB, {result.checkpoint_seconds:.0f} s at {args.write:g} GB/s a node"
    )
    print(
        f"  {result.images_per_second:,.0f} images/s at MFU {args.mfu:g}: {result.days:.1f} days and "
        f"{result.cost_usd:,.0f} USD for {samples:,.0f} images"
    )
    if not result.fits:
        print(f"  {result.advice}")
    return 0 if result.fits else 1
