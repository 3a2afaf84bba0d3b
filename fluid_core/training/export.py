"""A checkpoint's averaged weights as a model bundle, one parameter in memory at a time."""

from pathlib import Path

from fluid_core.config import Recipe
from fluid_core.latents.reader import EncodedDataset
from fluid_core.training.checkpoint import Checkpoint, load_ema_state


def export_bundle(checkpoint: str | Path, recipe: Recipe | None, out_dir: str | Path, weights: str = "ema") -> Path:
    """Write a FluidPipeline folder.

    Args:
        checkpoint: a `step_...` folder.
        recipe: where the encoders, latent statistics and generation defaults come from; by default the recipe that the
            checkpoint was trained with.
        weights: "ema", or "master" for the raw weights.

    Raises:
        ValueError: the checkpoint is not complete or damaged, or `out_dir` is not empty.
    """
    from fluid_core.encoders.image import ImageTokenizer
    from fluid_core.encoders.text import TextEncoder
    from fluid_core.generation.bundle import write_bundle

    found = Checkpoint(Path(checkpoint), 0)
    problem = found.problem()
    if problem:
        raise ValueError(problem)
    recipe = recipe or Recipe.model_validate(found.state["recipe"])
    image, text = recipe.image_tokenizer, recipe.text_encoder
    mean = std = None
    if recipe.model.tokens == "continuous":
        manifest = EncodedDataset(recipe.mixture[0].path).manifest
        trained = found.state.get("datasets")
        if trained and manifest.hash not in trained:
            raise ValueError(
                f"{recipe.mixture[0].path} is not the data set that {found.path} was trained on (manifest {manifest.hash[:12]}, "
                f"trained on {', '.join(digest[:12] for digest in trained)}): put that one there, its latent statistics are needed"
            )
        mean, std = manifest.latent_mean, manifest.latent_std
    return write_bundle(
        out_dir,
        Recipe.model_validate(found.state["recipe"]).model,
        load_ema_state(checkpoint, weights),
        recipe.generation,
        ImageTokenizer.from_pretrained(image.path, kind=image.kind, revision=image.revision),
        TextEncoder.from_pretrained(text.path, revision=text.revision, max_tokens=text.max_tokens, dtype=text.dtype),
        mean,
        std,
    )
