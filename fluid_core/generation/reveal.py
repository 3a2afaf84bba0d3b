"""Watching an image come into being: its tokens, in the order in which they were generated."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from fluid_core.generation.engine import DecodeSlot

if TYPE_CHECKING:
    from fluid_core.generation.pipeline import FluidPipeline

GREY = (128, 128, 128)


class Reveal:
    """A callback for FluidPipeline that keeps the state of the first images after every step."""

    def __init__(self, images: int = 4):
        self.images = images
        self.states: list[tuple[list[Tensor], list[Tensor]]] = []
        self._first: DecodeSlot | None = None

    def __call__(self, step: int, steps: int, slots: list[DecodeSlot]) -> None:
        self._first = self._first or slots[0]
        if slots[0] is not self._first:
            return  # a later batch: the first one is shown
        shown = slots[: self.images]
        self.states.append(([slot.tokens_NC.clone() for slot in shown], [slot.known_N.clone() for slot in shown]))

    def save(self, pipeline: "FluidPipeline", path: str | Path, seconds: float = 4.0) -> None:
        """Write the animation: unknown tokens are grey, and the finished picture stays for a second."""
        frames = [self._frame(pipeline, *state) for state in self.states]
        each = max(20, int(1000 * seconds / len(frames)))
        durations = [each] * (len(frames) - 1) + [each + 1000]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)

    def _frame(self, pipeline: "FluidPipeline", tokens: list[Tensor], known: list[Tensor]) -> Image.Image:
        assert self._first is not None
        grid = self._first.request.grid
        pairs = zip(pipeline.decode(tokens, grid), known, strict=True)
        images = [hide_unknown(image, known_N, grid) for image, known_N in pairs]
        frame = Image.new("RGB", (sum(image.width for image in images), images[0].height))
        for i, image in enumerate(images):
            frame.paste(image, (i * image.width, 0))
        return frame


def hide_unknown(image: Image.Image, known_N: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The image with the cells of unknown tokens painted grey."""
    h, w = grid
    cell_mask = Image.fromarray((known_N.reshape(h, w).to(torch.uint8) * 255).cpu().numpy())
    return Image.composite(image, Image.new("RGB", image.size, GREY), cell_mask.resize(image.size, Image.Resampling.NEAREST))
