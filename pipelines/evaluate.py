"""Export the newest checkpoint's EMA weights as a model bundle and score it: shapes, OpenMoji, and the tokenizer's ceiling.

    python pipelines/evaluate.py --config configs/demo.yaml

Writes <runs_dir>/<name>/evaluation: metrics.json, grids, samples. pipelines/promote.py registers the same bundle.
"""

import argparse
import shutil
from pathlib import Path

from fluid_core.config import Recipe
from fluid_core.entry import run_pipeline
from fluid_core.workflow.stage import Stage, file_sha256, stage_digest

INPUTS = ("prepare_openmoji", "prepare_shapes", "train_tokenizer", "encode_dataset", "pretrain")


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    digests = [stage_digest(recipe, name) for name in INPUTS]
    stage = Stage(recipe, "evaluate", config=[recipe.evaluation, recipe.generation, recipe.data.image_size], inputs=digests)
    if stage.skip(args.force):
        return
    import torch

    from fluid_core.evaluation.evaluate import evaluate
    from fluid_core.generation.pipeline import FluidPipeline
    from fluid_core.registry.bundle import bundle_digest
    from fluid_core.registry.promotion import export, newest_checkpoint
    from fluid_core.registry.tracking import Tracker

    checkpoint, step = newest_checkpoint(recipe.training_dir, recipe)
    bundle = export(recipe, checkpoint, step)
    registry = recipe.registry
    with Tracker(registry.tracking_uri, registry.experiment, f"evaluate step {step}") as tracker:
        pipeline = FluidPipeline.from_pretrained(bundle, device="cuda" if torch.cuda.is_available() else "cpu")
        result = evaluate(pipeline, recipe)
        folder = Path(recipe.evaluation.output or recipe.run_dir / "evaluation")
        result.save(folder, bundle=str(bundle), step=step, generation=recipe.generation.model_dump(mode="json"))
        samples = recipe.run_dir / "samples.png"
        shutil.copyfile(folder / "samples.png", samples)
        tracker.log_metrics(result.metrics, step=step)
        for name, picture in result.pictures.items():
            tracker.log_image(picture, key=name.removesuffix(".png"), step=step)
        tracker.log_artifact(folder / "metrics.json")
    stage.finish(
        outputs=[folder, samples, bundle],
        metrics=result.metrics,
        output_digest=bundle_digest(bundle) + file_sha256(folder / "metrics.json"),
        bundle=str(bundle),
        step=step,
    )
    width = max(map(len, result.metrics))
    for name, value in result.metrics.items():
        print(f"evaluate: {name:<{width}} {value:.3f}" + (" dB" if name.endswith("psnr") else f"  of {result.samples[name]}"))


if __name__ == "__main__":
    run_pipeline(main, __doc__)
