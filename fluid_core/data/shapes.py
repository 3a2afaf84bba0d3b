"""Shapes: scenes whose objects sit in the cells of a 2x2 grid, with an exact checker: GenEval in small, without a detector.

A cell is 32 px at 64 px: a whole number of the model's tokens, so that a scene is a choice of a few token patterns. Objects
have one size and stand in the middle of their cell; the ground is white. Categories:

  single     "a red circle"                               the object in any cell
  two        "a red circle and a blue square"             two different objects in any two cells
  count      "three green triangles"                      two to four of one object in any cells
  position   "a red circle left of a blue square"         side by side in one row (left of, right of) or column (above, below)

HELDOUT pairs of colour and shape occur in no training scene of any category; each of their colours and shapes does.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fluid_core.data.openmoji import encode_png
from fluid_core.data.shard_writer import ShardSample

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 200, 30),
    "purple": (150, 50, 190),
    "black": (30, 30, 30),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
HELDOUT = (("green", "circle"), ("yellow", "square"), ("blue", "triangle"), ("purple", "cross"))
CATEGORIES = ("single", "two", "count", "position")
# Two objects without a relation take longest to learn: which colour goes with which shape. With less of position some runs
# never learn to tell "above" from "below" (docs/journal.md, 2026-11-27).
CATEGORY_SHARES = {"single": 0.06, "two": 0.42, "count": 0.22, "position": 0.30}
NUMBERS = {2: "two", 3: "three", 4: "four"}
SPLITS = ("train", "validation", "heldout")
GRID = 2
CELLS = GRID * GRID  # numbered row by row
NEIGHBOURS = {  # relation -> (cell of the first object, cell of the second)
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}
UNCLEAR = 18.0
"""Root-mean-square distance (0..255) to the nearest template beyond which a cell is unclear. A Gaussian blur of 2 px at 64 px
costs 13, JPEG at quality 10 costs 14; a faded or half-drawn object costs 20 and more."""
VALIDATION_SHARE = 32  # one scene in 32, chosen by its hash, is kept out of training

Pair = tuple[str, str]
Category = Literal["single", "two", "count", "position"]
ALL_PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELDOUT)


@dataclass(frozen=True)
class ScenePrompt:
    """A caption and what a picture of it must hold: spec = {"objects": [{"colour", "shape", "count"}], "relation"}."""

    caption: str
    category: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """A prompt with one placement: for each cell a (colour, shape) or None."""

    prompt: ScenePrompt
    cells: tuple[Pair | None, ...]


def prompts(category: str, split: str, n: int, seed: int) -> list[ScenePrompt]:
    """`n` prompts of a category; where it has fewer than n distinct ones they repeat evenly.

    Args:
        split: "train" or "validation" for pairs seen in training, "heldout" for prompts with a pair never seen.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; one of {', '.join(CATEGORIES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    rng = random.Random(f"prompts {category} {split} {seed}")
    every = _all_prompts(category, split == "heldout")
    drawn: list[ScenePrompt] = []
    while len(drawn) < n:
        drawn += rng.sample(every, min(len(every), n - len(drawn)))
    return drawn


def scenes(split: str, n: int, seed: int) -> Iterator[Scene]:
    """`n` scenes in the shares of CATEGORY_SHARES. Validation scenes are placements that no training scene has."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    names, weights = list(CATEGORY_SHARES), list(CATEGORY_SHARES.values())
    for index in range(n):
        rng = random.Random(f"scene {split} {seed} {index}")
        while True:
            category = rng.choices(names, weights)[0]
            scene = _place(rng.choice(_all_prompts(category, split == "heldout")), rng)
            if split == "heldout" or _is_validation(scene) == (split == "validation"):
                break
        yield scene


def render(cells: tuple[Pair | None, ...], image_size: int) -> np.ndarray:
    """The picture of a placement, uint8 (image_size, image_size, 3)."""
    cell = cell_side(image_size)
    tiles = [_tile(pair, cell) for pair in cells]
    rows = [np.concatenate(tiles[start : start + GRID], axis=1) for start in range(0, CELLS, GRID)]
    return np.concatenate(rows, axis=0)


def cell_side(image_size: int) -> int:
    """Pixels a side of one cell."""
    if image_size % GRID or image_size // GRID < 16:
        raise ValueError(f"data.image_size {image_size}: shapes need an even size of at least 32 pixels")
    return image_size // GRID


def read_cells(image: Image.Image | np.ndarray) -> list[Pair | str | None]:
    """What each cell shows: (colour, shape), None for bare ground, or "unclear".

    A cell is compared with every rendered template after both are blurred, so that soft edges do not count, and must be
    close to its nearest template in absolute terms.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1] or pixels.dtype != np.uint8:
        raise ValueError(f"the checker wants a square uint8 RGB image, got {pixels.shape} {pixels.dtype}")
    cell = cell_side(pixels.shape[0])
    labels, templates = _templates(cell)
    read: list[Pair | str | None] = []
    for index in range(CELLS):
        top, left = index // GRID * cell, index % GRID * cell
        tile = _soften(pixels[top : top + cell, left : left + cell])
        distance = np.sqrt(((templates - tile.reshape(1, -1)) ** 2).mean(axis=1))
        best = int(distance.argmin())
        read.append(labels[best] if distance[best] <= UNCLEAR else "unclear")
    return read


def check(image: Image.Image | np.ndarray, spec: dict[str, Any]) -> bool:
    """Whether a picture shows exactly what `spec` says: these objects, as many, none else, in the stated relation."""
    cells = read_cells(image)
    if "unclear" in cells:
        return False
    wanted = Counter({(item["colour"], item["shape"]): item["count"] for item in spec["objects"]})
    if Counter(cell for cell in cells if cell is not None) != wanted:
        return False
    if spec["relation"] is None:
        return True
    first, second = ((item["colour"], item["shape"]) for item in spec["objects"])
    return (cells.index(first), cells.index(second)) in NEIGHBOURS[spec["relation"]]


def samples(split: str, n: int, image_size: int, seed: int) -> Iterator[ShardSample]:
    """The image-text pairs of one split."""
    for index, scene in enumerate(scenes(split, n, seed)):
        spec = scene.prompt.spec | {"cells": [" ".join(pair) if pair else None for pair in scene.cells]}
        metadata = {"source": "shapes", "category": scene.prompt.category, "split": split, "spec": spec}
        yield {
            "__key__": f"shapes-{split}-{index:06d}",
            "image_bytes": encode_png(render(scene.cells, image_size)),
            "extension": "png",
            "caption": scene.prompt.caption,
            "metadata": metadata,
        }


@lru_cache(maxsize=16)
def _all_prompts(category: str, heldout: bool) -> tuple[ScenePrompt, ...]:
    """Every prompt of a category: of seen pairs only, or with at least one pair held out."""
    found: list[ScenePrompt] = []
    pairs = ALL_PAIRS if heldout else SEEN_PAIRS
    if category in ("single", "count"):
        for pair in HELDOUT if heldout else pairs:
            for count in (1,) if category == "single" else tuple(NUMBERS):
                found.append(_prompt(category, [(pair, count)], None))
        return tuple(found)
    relations = (None,) if category == "two" else tuple(NEIGHBOURS)
    for first in pairs:
        for second in pairs:
            if first != second and (not heldout or first in HELDOUT or second in HELDOUT):
                found += [_prompt(category, [(first, 1), (second, 1)], relation) for relation in relations]
    return tuple(found)


def _prompt(category: str, objects: list[tuple[Pair, int]], relation: str | None) -> ScenePrompt:
    spoken = []
    for (colour, shape), count in objects:
        spoken.append(f"a {colour} {shape}" if count == 1 else f"{NUMBERS[count]} {colour} {SHAPES[shape]}")
    caption = f" {relation or 'and'} ".join(spoken)
    items = [{"colour": colour, "shape": shape, "count": count} for (colour, shape), count in objects]
    return ScenePrompt(caption, category, {"objects": items, "relation": relation})


def _place(prompt: ScenePrompt, rng: random.Random) -> Scene:
    cells: list[Pair | None] = [None] * CELLS
    objects = [(item["colour"], item["shape"]) for item in prompt.spec["objects"] for _ in range(item["count"])]
    relation = prompt.spec["relation"]
    where = rng.choice(NEIGHBOURS[relation]) if relation else rng.sample(range(CELLS), len(objects))
    for cell, pair in zip(where, objects, strict=True):
        cells[cell] = pair
    return Scene(prompt, tuple(cells))


def _is_validation(scene: Scene) -> bool:
    digest = hashlib.sha256(f"{scene.prompt.category} {scene.cells}".encode()).digest()
    return digest[0] % VALIDATION_SHARE == 0


@lru_cache(maxsize=256)
def _tile(pair: Pair | None, cell: int) -> np.ndarray:
    """One cell with its object, drawn four times larger and averaged down: uint8 (cell, cell, 3)."""
    if pair is None:
        return np.full((cell, cell, 3), 255, dtype=np.uint8)
    colour, shape = pair
    scale = 4
    side = cell * scale
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    low, high = side * 5 // 32, side - side * 5 // 32 - 1
    middle, fill = side / 2, COLOURS[colour]
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        inset = side // 32
        draw.rectangle((low + inset, low + inset, high - inset, high - inset), fill=fill)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=fill)
    else:
        arm = side * 4 // 32
        draw.rectangle((middle - arm, low, middle + arm - 1, high), fill=fill)
        draw.rectangle((low, middle - arm, high, middle + arm - 1), fill=fill)
    return np.asarray(picture.resize((cell, cell), Image.Resampling.BOX))


def _soften(tile: np.ndarray) -> np.ndarray:
    blurred = Image.fromarray(np.ascontiguousarray(tile)).filter(ImageFilter.GaussianBlur(tile.shape[0] / 16))
    return np.asarray(blurred, dtype=np.float32)


@lru_cache(maxsize=4)
def _templates(cell: int) -> tuple[list[Pair | None], np.ndarray]:
    labels: list[Pair | None] = [None, *ALL_PAIRS]
    return labels, np.stack([_soften(_tile(label, cell)).reshape(-1) for label in labels])
