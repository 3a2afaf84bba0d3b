"""Picture grids with captions, as PNG: what the scores look like."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 128
GAP = 8
_LINE = 13
_LINES = 3
_INK, _PAPER, _FAINT, _WRONG = "#1c2024", "#ffffff", "#6b7480", "#c62a2f"


@dataclass(frozen=True)
class Tile:
    """One picture: uint8 (S, S, 3), the caption under it, and whether it was right (None: not asked)."""

    image: np.ndarray
    caption: str
    right: bool | None = None


def draw_grid(sections: Sequence[tuple[str, Sequence[Tile]]], columns: int = 8) -> Image.Image:
    """Sections with a heading each, pictures side by side; a wrong one has a red frame."""
    font, bold = ImageFont.load_default(11), ImageFont.load_default(15)
    row_height = TILE + _LINES * _LINE + GAP
    heading = 30
    width = columns * (TILE + GAP) + GAP
    height = sum(heading + -(-len(tiles) // columns) * row_height for _, tiles in sections) + GAP
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = 0
    for title, tiles in sections:
        draw.text((GAP, top + 8), title, fill=_INK, font=bold)
        top += heading
        for index, tile in enumerate(tiles):
            x, y = GAP + index % columns * (TILE + GAP), top + index // columns * row_height
            picture = Image.fromarray(tile.image).resize((TILE, TILE), Image.Resampling.BICUBIC)
            canvas.paste(picture, (x, y))
            if tile.right is False:
                draw.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=_WRONG, width=2)
            for number, line in enumerate(textwrap.wrap(tile.caption, 21)[:_LINES]):
                draw.text((x, y + TILE + 2 + number * _LINE), line, fill=_FAINT, font=font)
        top += -(-len(tiles) // columns) * row_height
    return canvas


def evenly(count: int, number: int) -> list[int]:
    """`number` indices spread evenly over `count`: a choice that looks at no picture."""
    number = min(number, count)
    return [index * count // number for index in range(number)]
