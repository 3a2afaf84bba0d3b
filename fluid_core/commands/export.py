"""A checkpoint's EMA weights as a model bundle, one parameter in memory at a time.

fluid export runs/demo/checkpoints/step_00002000 runs/demo/bundles/mine
fluid export runs/demo runs/demo/bundles/mine            (the newest complete checkpoint)
"""

import argparse
from pathlib import Path

from fluid_core.config import Recipe, load_recipe
from fluid_core.training.checkpoint import STATE, latest_complete
from fluid_core.training.export import export_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step_... folder, or a run's folder")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--config", help="take encoders, data and generation defaults from this recipe, not the checkpoint's own"
    )
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged (default) or raw weights")


def run(args: argparse.Namespace) -> None:
    folder = Path(args.checkpoint)
    if not (folder / STATE).is_file():
        root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        newest = latest_complete(root, verify=True, report=print)
        if newest is None:
            raise ValueError(f"{folder} is neither a complete checkpoint nor a run that has one")
        folder = newest.path
    recipe: Recipe | None = load_recipe(args.config) if args.config else None
    out = export_bundle(folder, recipe, args.out, args.weights)
    print(f"{folder} -> {out}")
