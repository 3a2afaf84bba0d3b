"""Images for a file of prompts, offline, as a Ray Data job that can be killed at any time and goes on where it was.

    python pipelines/generate_batch.py --config configs/demo.yaml --prompts prompts.jsonl --output runs/demo/batch
    python pipelines/generate_batch.py --config configs/fluid-3b.yaml --prompts s3://bucket/in.jsonl --output s3://bucket/out

Each line: {"prompt": "...", "seed": 1, "steps": 12, "guidance": 2.0, "size": "64x64", "custom_id": "..."}, only the prompt is
needed; or a line of OpenAI's batch format. Blank lines are not counted. Writes <output>/images/<chunk>/<line>.png, <output>/output.jsonl (one line an
image, in the order of the input), <output>/errors.jsonl (lines that could not be done, with the reason) and summary.json.
"""

import argparse
import json

from fluid_core.config import Recipe
from fluid_core.entry import ray_session, run_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", required=True, help="a JSONL file, local or s3://")
    parser.add_argument("--output", required=True, help="a folder, local or s3://; the same one to go on")
    parser.add_argument("--chunk", type=int, help="lines committed together (default: 4 batches of serving.max_batch_size)")


def main(recipe: Recipe, args: argparse.Namespace) -> int:
    from fluid_core.serving.offline import OfflineJob

    job = OfflineJob(recipe, args.prompts, args.output, args.chunk, force=args.force)
    with ray_session():
        summary = job.run()
    print(json.dumps(summary))
    print(
        f"generate_batch: {summary['images']} images of {summary['rows']} lines, {summary['failed']} errors, in {args.output}"
    )
    return 0


if __name__ == "__main__":
    run_pipeline(main, __doc__, add_arguments)
