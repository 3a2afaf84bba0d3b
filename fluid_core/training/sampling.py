"""Sample grids during training: fixed prompts and seeds, from the averaged and from the raw weights.

Rank 0 keeps a plain copy of the model, filled parameter by parameter from the shards; the others only take part in that.
"""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from fluid_core.config import Recipe
from fluid_core.training.ema import ShardedEMA
from fluid_core.training.engine import Engine
from fluid_core.training.loader import Collator

MAX_PARAMETERS = 2_000_000_000


class Sampler:
    """Raises ValueError for prompts that cannot be drawn, and for models that do not fit beside the training state."""

    def __init__(self, recipe: Recipe, engine: Engine, ema: ShardedEMA, collator: Collator):
        if engine.parameters > MAX_PARAMETERS:
            raise ValueError(
                f"training.sample_prompts: a model of {engine.parameters / 1e9:.1f}B parameters is too large to keep whole beside "
                "its training state; set sample_prompts: [] and use `fluid export` and `fluid generate` on checkpoints"
            )
        self.recipe, self.engine, self.ema = recipe, engine, ema
        self.pipeline: Any = None
        if engine.partitions.rank == 0:
            from fluid_core.encoders.image import ImageTokenizer
            from fluid_core.encoders.text import TextEncoder
            from fluid_core.generation.pipeline import FluidPipeline
            from fluid_core.model.fluid import FluidModel

            image, text = recipe.image_tokenizer, recipe.text_encoder
            with torch.random.fork_rng():
                model = FluidModel(recipe.model).requires_grad_(False)
            self.pipeline = FluidPipeline(
                model.to(engine.device),
                ImageTokenizer.from_pretrained(image.path, kind=image.kind, revision=image.revision, device=engine.device),
                TextEncoder.from_pretrained(
                    text.path, revision=text.revision, max_tokens=text.max_tokens, dtype=text.dtype, device=engine.device
                ),
                recipe.generation,
                collator.mean or None,
                collator.std or None,
            )
            # A prompt or setting that cannot be drawn is told now, not in the middle of the run.
            self.pipeline.requests(recipe.training.sample_prompts, seed=recipe.seed)

    def grids(self) -> Iterator[tuple[str, Image.Image]]:
        """("ema", picture) and ("raw", picture) on rank 0, nothing on the others. Collective: exhaust it on every worker."""
        masters = [b.detach() for b in self.engine.partitions.buffers]
        for name, flats in (("ema", self.ema.flats), ("raw", masters)):
            self._fill(flats)
            if self.pipeline is not None:
                images = self.pipeline(self.recipe.training.sample_prompts, seed=self.recipe.seed)
                yield name, _row(images)

    @torch.no_grad()
    def _fill(self, flats: list[torch.Tensor]) -> None:
        target = dict(self.pipeline.model.named_parameters()) if self.pipeline is not None else {}
        for name, values in self.engine.partitions.gather_to_rank0(flats):
            if values is not None:
                target[name].copy_(values)


def _row(images: list[Image.Image]) -> Image.Image:
    side = max(image.height for image in images)
    grid = Image.new("RGB", (sum(image.width for image in images), side), "white")
    left = 0
    for image in images:
        grid.paste(image, (left, 0))
        left += image.width
    return grid
