"""Train the model: Ray Train, DeepSpeed ZeRO, EMA, checkpoints; loss, speed and samples go to MLflow.

    python pipelines/pretrain.py --config configs/demo.yaml
    ray job submit --working-dir . -- python pipelines/pretrain.py --config configs/fluid-10b.yaml
    torchrun --nproc-per-node 8 pipelines/pretrain.py --config configs/fluid-1b.yaml     without Ray: Slurm, one machine of GPUs

Killed or stopped (SIGTERM and Ctrl-C save a checkpoint first) and started again with --resume, it goes on exactly where the
last complete checkpoint was. Without --resume a run's name can be used once. `--resume same` goes on only with a run of this
very recipe and data: for jobs that are started again by machines.
"""

import argparse
import os
import sys

from fluid_core.config import Recipe
from fluid_core.entry import run_pipeline
from fluid_core.latents.reader import EncodedDataset
from fluid_core.training.checkpoint import latest_complete
from fluid_core.training.run import is_driver, pretrain
from fluid_core.workflow.stage import Stage

# Settings that change how a run is carried out and watched, but not what it learns: a run goes on when they change.
_CONDUCT = {
    "run_name", "workers", "gpus_per_worker", "zero_stage", "micro_batch_size", "offload_optimizer", "activation_checkpointing", "compile",
    "checkpoint_every", "keep_last", "keep_every", "checkpoint_path", "log_every", "validate_every", "validation_samples",
    "sample_every", "sample_prompts", "max_failures", "watchdog_seconds",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", nargs="?", const="any", choices=("same", "any"),
        help="go on from the last checkpoint under the run's name, if there is one, whatever recipe it was; same: only if it was this one",
    )  # fmt: skip


def main(recipe: Recipe, args: argparse.Namespace) -> int:
    if not is_driver():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - everything is said once, by the driver
    training = recipe.training
    paths = [item.path for item in training.datasets] or [recipe.encode.output]
    hashes = [EncodedDataset(path).manifest.hash for path in paths]
    # The default reader and start are left out: runs from before there was a choice keep their fingerprint.
    weights = [[item.weight, item.from_step] if item.from_step else item.weight for item in training.datasets]
    unlearned = _CONDUCT | {"datasets"} | ({"loader"} if training.loader == "parquet" else set())
    learned = training.model_dump(mode="json", exclude=unlearned)
    stage = Stage(recipe, "pretrain", config=[recipe.model, learned, weights, recipe.seed], inputs=hashes)
    if training.run_name and training.run_name != recipe.name:
        stage.path = recipe.training_dir / "stages" / "pretrain.json"
    if not args.force and stage.complete():
        stage.skip()
        return 0
    # The record of what is there stays until the run's name is ours: a start may be refused.
    result = pretrain(
        recipe, stage.fingerprint, resume=args.resume, fresh=args.force, begin=lambda: stage.path.unlink(missing_ok=True)
    )
    if not is_driver():
        return 128 + result["stopped"] if result["stopped"] else 0
    if result["stopped"]:
        print(
            f"pretrain: stopped at step {result['step']}, checkpoint saved; --resume goes on from there",
            file=sys.stderr,
        )
        return 128 + result["stopped"]
    root = training.checkpoint_folder(recipe.training_dir)
    newest = latest_complete(root)
    assert newest is not None
    marker = (newest.path / "_COMPLETE").read_text().strip()
    stage.finish(
        [root, recipe.training_dir / "metrics.jsonl"],
        metrics=result["metrics"],
        output_digest=marker,
        step=result["step"],
        checkpoint=str(newest.path),
    )
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    print(f"pretrain: {result['step']} steps{', ' + numbers if numbers else ''}; {newest.path}")
    return 0


if __name__ == "__main__":
    run_pipeline(main, __doc__, add_arguments)
