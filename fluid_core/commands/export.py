"""A checkpoint's EMA weights as a model bundle, one parameter in memory at a time.

fluid export runs/demo/checkpoints/step_00002000 runs/demo/bundles/mine
fluid export runs/demo runs/demo/bundles/mine            (the newest complete checkpoint)
fluid export s3://bucket/demo/step_00002000 mine
fluid export s3://bucket/demo mine
"""

import argparse
import tempfile
from pathlib import Path

from fluid_core.config import Recipe, load_recipe
from fluid_core.training.checkpoint import STATE, latest_complete
from fluid_core.training.export import export_bundle
from fluid_core.training.remote import RemoteCheckpoints, fetch_newest, places_of_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step_... folder, or a run's folder; either may be on S3")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--config", help="take encoders, data and generation defaults from this recipe, not the checkpoint's own"
    )
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged (default) or raw weights")


def run(args: argparse.Namespace) -> None:
    recipe: Recipe | None = load_recipe(args.config) if args.config else None
    folder = Path(args.checkpoint)
    if "://" not in args.checkpoint and (folder / STATE).is_file():
        print(f"{folder} -> {export_bundle(folder, recipe, args.out, args.weights)}")
        return
    root, uri = places_of_run(args.checkpoint)
    # What is on S3 comes down beside the bundle, and goes when the bundle is written.
    out = Path(args.out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.fetch-", dir=out.parent) as scratch:
        newest = latest_complete(root, verify=True, report=print) if root else None
        if uri and newest is None:
            root = Path(scratch)
            _fetch(uri, root)
            newest = latest_complete(root)
        if newest is None:
            raise ValueError(f"{args.checkpoint} is neither a complete checkpoint nor a run that has one")
        out = export_bundle(newest.path, recipe, out, args.weights)
    print(f"{args.checkpoint} step {newest.step} -> {out}")


def _fetch(uri: str, root: Path) -> None:
    """One checkpoint, or the newest complete one of a prefix, into `root`."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    if name.startswith("step_"):
        remote = RemoteCheckpoints(parent)
        for checkpoint in remote.list():
            if checkpoint.uri == uri.rstrip("/"):
                remote.fetch(checkpoint, root)
    else:
        fetch_newest(RemoteCheckpoints(uri), root, report=print)
