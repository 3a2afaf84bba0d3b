"""Images from prompts, with a model folder or a registered model.

fluid generate "red apple" --model runs/demo/bundles/latest -n 4 --seed 0 -o out/ [--reveal out.gif]
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", help="one or more prompts, each in quotes")
    parser.add_argument("--model", required=True, help="a bundle folder, or models:/name@alias")
    parser.add_argument("-n", "--count", type=int, default=1, help="images of each prompt (default 1)")
    parser.add_argument("-o", "--output", default="out", help="folder for the images (default out)")
    parser.add_argument("--seed", type=int, default=0, help="image i of the call takes seed + i (default 0)")
    parser.add_argument("--num-steps", type=int, help="autoregressive steps")
    parser.add_argument("--head-steps", type=int, help="diffusion or flow steps for each token")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--guidance-schedule", choices=("constant", "linear"))
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument("--size", help="pixels: SIDE or WIDTHxHEIGHT")
    parser.add_argument("--solver", choices=("ddpm", "ddim", "dpm2", "euler", "heun"))
    parser.add_argument("--order", choices=("random", "checkerboard", "raster"))
    parser.add_argument("--truncate", action="store_true", help="cut prompts longer than the text limit instead of refusing")
    parser.add_argument("--batch-size", type=int, help="images that step together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on cpu, bf16 elsewhere")
    parser.add_argument("--reveal", metavar="FILE.gif", help="animate the first images' tokens in their order")


def run(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ValueError(f"-n {args.count}: at least 1")
    if args.reveal and not args.reveal.lower().endswith(".gif"):
        raise ValueError(f"--reveal {args.reveal}: the animation is a GIF, so name a file that ends in .gif")
    if args.reveal and Path(args.reveal).is_dir():
        raise ValueError(f"--reveal {args.reveal} is a folder: name a file")
    folder = Path(args.output)
    for made in (folder, Path(args.reveal or ".").parent):
        try:
            made.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"{made} cannot be made a folder, a file is in its way: name another") from None
    from fluid_core.generation.engine import DecodeSlot
    from fluid_core.generation.pipeline import BATCH_SIZE, FluidPipeline
    from fluid_core.generation.reveal import Reveal

    pipeline = FluidPipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    requests = pipeline.requests(
        [prompt for prompt in args.prompts for _ in range(args.count)],
        num_steps=args.num_steps,
        head_steps=args.head_steps,
        guidance_scale=args.guidance_scale,
        guidance_schedule=args.guidance_schedule,
        temperature=args.temperature,
        negative_prompts=args.negative_prompt,
        seed=args.seed,
        size=_size(args.size),
        solver=args.solver,
        order=args.order,
        truncate=args.truncate,
    )
    reveal = Reveal() if args.reveal else None
    total = -(-len(requests) // max(1, args.batch_size or BATCH_SIZE))
    with tqdm(desc="generate", unit="step", file=sys.stderr) as bar:

        def callback(step: int, steps: int, slots: list[DecodeSlot]) -> None:
            bar.total = steps * total
            bar.update()
            if reveal is not None:
                reveal(step, steps, slots)

        try:
            images = pipeline.run(requests, callback=callback, batch_size=args.batch_size)
        except FloatingPointError as error:
            raise ValueError(str(error)) from None
    for i, image in enumerate(images):
        image.save(folder / f"{i:05d}.png")
        print(folder / f"{i:05d}.png")
    if reveal is not None:
        reveal.save(pipeline, args.reveal)
        print(args.reveal)


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--size {text!r}: write SIDE or WIDTHxHEIGHT, for example 256 or 384x256")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
