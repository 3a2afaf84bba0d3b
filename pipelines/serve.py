"""Serve the promoted model over HTTP (Ray Serve, OpenAI-compatible).

python pipelines/serve.py --config configs/demo.yaml --port 8000   # until Ctrl-C, which drains
python pipelines/serve.py --config configs/demo.yaml --check       # start, generate a batch over HTTP, stop
python pipelines/serve.py --config configs/demo.yaml --new-key ann # add an API key to serving.api_keys_file
"""

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from fluid_core.config import Recipe
from fluid_core.entry import ray_session, run_pipeline
from fluid_core.workflow.stage import Stage, file_sha256, stage_digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="overrides serving.port; 0 takes any free port")
    parser.add_argument("--host", help="overrides serving.host; 0.0.0.0 lets other machines in")
    parser.add_argument("--check", action="store_true", help="stage `serve`: generate the sample prompts over HTTP, then stop")
    parser.add_argument("--prompts", help="with --check: a text file, one prompt a line (default: training.sample_prompts)")
    parser.add_argument("--new-key", metavar="NAME", help="make an API key, print it once, and stop")


def main(recipe: Recipe, args: argparse.Namespace) -> int | None:
    if args.port is not None:
        recipe.serving.port = args.port
    if args.host is not None:
        recipe.serving.host = args.host
    if args.new_key:
        return _new_key(recipe, args.new_key)
    if args.prompts and not args.check:
        raise ValueError("--prompts belongs to --check")
    return _check(recipe, args) if args.check else _foreground(recipe)


def _new_key(recipe: Recipe, name: str) -> None:
    from fluid_core.serving.keys import new_key

    if recipe.serving.api_keys_file is None:
        raise ValueError("set serving.api_keys_file first: it is where the hash of the key is kept")
    print(new_key(name, recipe.serving.api_keys_file))


def _foreground(recipe: Recipe) -> None:
    from fluid_core.serving.app import serving

    ready, stop = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        if stop.is_set() or not ready.is_set():  # nothing is in flight yet, or the user will not wait for it
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with ray_session(serves=True):
        with serving(recipe) as (url, ref):
            ready.set()
            print(f"Fluid serves {ref.label} at {url}  (studio: {url}/  API: {url}/docs  Ctrl-C stops)", flush=True)
            while not stop.wait(1.0):
                pass
            print("finishing what is in flight ...", file=sys.stderr)


def _check(recipe: Recipe, args: argparse.Namespace) -> None:
    from fluid_core.serving.app import serving
    from fluid_core.serving.client import generate_to_folder
    from fluid_core.serving.keys import new_key

    prompts = recipe.training.sample_prompts or ["a red circle", "two blue squares"]
    if args.prompts:
        prompts = [line.strip() for line in Path(args.prompts).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompt: write one a line")
    stage = Stage(recipe, "serve", [recipe.serving, recipe.seed, prompts], [stage_digest(recipe, "promote")])
    if stage.skip(force=args.force):
        return
    folder = recipe.run_dir / "serve"
    # The check is about the way to the model: not about a port that the user may have something on, nor the users' keys.
    recipe.serving.port = 0 if args.port is None else args.port
    recipe.serving.requests_per_minute = None
    key = None
    with tempfile.TemporaryDirectory(prefix="fluid-check-") as scratch, ray_session(serves=True):
        if recipe.serving.api_keys_file is not None:
            recipe.serving.api_keys_file = f"{scratch}/keys"
            key = new_key("check", recipe.serving.api_keys_file)
        with serving(recipe) as (url, ref):
            started = time.monotonic()
            images = generate_to_folder(url, prompts, folder, recipe.seed, key)
            seconds = time.monotonic() - started
    listing = [{"prompt": i.prompt, "file": i.path.name, "seed": i.seed, "model": i.model} for i in images]
    (folder / "images.json").write_text(json.dumps(listing, indent=2) + "\n")
    model = {"name": ref.name, "version": ref.version, "alias": ref.alias}
    stage.finish(
        outputs=[folder],
        metrics={"images": len(images), "seconds": round(seconds, 3), "images_per_second": round(len(images) / seconds, 3)},
        output_digest=file_sha256(images[0].path),
        model=model,
    )
    print(f"serve: {len(images)} images over HTTP from {ref.label} in {seconds:.1f} s, in {folder}")


if __name__ == "__main__":
    run_pipeline(main, __doc__, add_arguments)
