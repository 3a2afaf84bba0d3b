"""Train a small image tokenizer (KL VAE or VQ) under Ray Train; nothing to do where the recipe names a pre-trained one.

    python pipelines/train_tokenizer.py --config configs/demo.yaml

Writes a diffusers folder to image_tokenizer.path; reconstructions and their PSNR go to MLflow. Killed and started again, it
goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

from fluid_core.config import Recipe
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.pixels import list_tars
from fluid_core.encoders.tokenizer_run import train_tokenizer, work_folder
from fluid_core.entry import run_pipeline
from fluid_core.workflow.stage import Stage, stage_digest


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    section = recipe.image_tokenizer
    if section.train is None:
        stage = Stage(recipe, "train_tokenizer", config=[section])
        if not stage.skip(args.force):
            stage.finish([], pretrained=section.path)
            print(f"train_tokenizer: the recipe names the pre-trained tokenizer {section.path}; nothing to train")
        return
    tars = list_tars(recipe.data.sources, "data.sources") + list_tars(recipe.data.validation_sources, "data.validation_sources")
    made_by = [stage_digest(recipe, name) for name in ("prepare_openmoji", "prepare_shapes")]
    inputs = [*made_by, *(f"{tar} {tar.stat().st_size}" for tar in tars)]
    stage = Stage(recipe, "train_tokenizer", config=[section, recipe.data.image_size, recipe.seed], inputs=inputs)
    work = work_folder(recipe)
    if stage.skip(args.force):
        return
    if args.force:
        (work / "last.pt").unlink(missing_ok=True)
    result = train_tokenizer(recipe, stage.fingerprint)
    identity = ImageTokenizer.from_pretrained(section.path, section.kind).identity()
    pictures = work / "reconstructions.png"
    stage.finish(
        [section.path, pictures],
        metrics=result["metrics"],
        counts={"set_aside": result["set_aside"]},
        output_digest=identity["sha256"],
        parameters=result["parameters"],
        reconstructions=str(pictures),
    )
    quality = ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
    print(f"train_tokenizer: {Path(section.path)} ({result['parameters'] / 1e6:.2f}M parameters): {quality}")


if __name__ == "__main__":
    run_pipeline(main, __doc__)
