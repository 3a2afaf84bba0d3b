"""A loaded model version, and a client's task in the engine's terms."""

import io
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from fluid_core.config import Recipe
from fluid_core.registry.models import ModelRef
from fluid_core.serving.tasks import ImageTask

if TYPE_CHECKING:
    from fluid_core.generation.engine import GenerationRequest


class ServedModel:
    """A FluidPipeline with the name and version under which it is served."""

    def __init__(self, ref: ModelRef, recipe: Recipe):
        from fluid_core.generation.pipeline import FluidPipeline

        self.ref = ref
        # Those under which this version was registered; a folder has the recipe's.
        self.licence = ref.tags.get("fluid.licence", recipe.registry.licence)
        self.attribution = ref.tags.get("fluid.attribution", recipe.registry.attribution)
        self.pipeline = FluidPipeline.from_pretrained(ref.local(), device="cuda" if recipe.serving.gpus_per_replica else "cpu")
        self.loaded = int(time.time())
        self.names = {ref.name, ref.label, f"{ref.name}@{ref.alias}"}
        """Under which a client may ask for it."""

    def requests(self, task: ImageTask) -> list["GenerationRequest"]:
        """One engine request an image; the text is encoded once.

        Raises:
            ValueError: what this model cannot do, in the pipeline's words but with the API's names.
        """
        settings: dict[str, Any] = {
            "num_steps": task.steps,
            "guidance_scale": task.guidance,
            "temperature": task.temperature,
            "negative_prompts": task.negative_prompt,
        }
        try:
            if task.image is None or task.mask is None:
                seeds = [task.seed_of(index) for index in range(task.count)]
                return self.pipeline.requests([task.prompt] * task.count, seed=seeds, size=task.size, **settings)
            image, mask = (Image.open(io.BytesIO(data)) for data in (task.image, task.mask))
            edit = self.pipeline.edit_request(image, mask, task.prompt, seed=task.seed, **settings)
            # The seed alone tells them apart: the image is encoded once.
            return [replace(edit, seed=task.seed_of(index)) for index in range(task.count)]
        except ValueError as error:
            raise ValueError(str(error).replace("num_steps", "steps").replace("guidance_scale", "guidance")) from error

    def started(self, task: ImageTask, first: "GenerationRequest") -> dict[str, Any]:
        """The details of a `started` event."""
        rows, columns = first.grid
        pixels = self.pipeline.pixels_per_token
        return {
            "model": self.ref.label,
            "size": f"{columns * pixels}x{rows * pixels}",
            "grid": [rows, columns],
            "text_tokens": len(first.text_LE),
            "image_tokens": rows * columns,
        }

    def describe(self) -> dict[str, Any]:
        """The fields of ModelInfo."""
        grid, pixels = self.pipeline.model.config.grid, self.pipeline.pixels_per_token
        return {
            "id": self.ref.name,
            "version": self.ref.version,
            "alias": self.ref.alias,
            "created": self.loaded,
            "image_size": f"{grid * pixels}x{grid * pixels}",
            "size_multiple": pixels,
            "grid": [grid, grid],
            "max_prompt_tokens": self.pipeline.text_encoder.max_tokens,
            "defaults": self.pipeline.generation.model_dump(mode="json"),
            "licence": self.licence,
        }

    def provenance(self, task: ImageTask, index: int, settings: dict[str, Any]) -> dict[str, Any]:
        """What goes into the image's metadata."""
        return {
            "prompt": task.prompt,
            "negative_prompt": task.negative_prompt,
            "seed": task.seed_of(index),
            "model": self.ref.label,
            "bundle_sha256": self.ref.tags.get("fluid.bundle_sha256"),
            "edited": task.image is not None,
            "settings": settings,
            "licence": self.licence,
            "attribution": self.attribution,
            "generator": "Fluid (arXiv 2410.13863)",
        }
