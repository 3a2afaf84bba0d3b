import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from fluid_core.data import shapes

SCENES = [*shapes.scenes("train", 80, seed=1), *shapes.scenes("heldout", 40, seed=2)]
scene_strategy = st.sampled_from(SCENES)


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@settings(max_examples=60, deadline=None)
@given(
    scene=scene_strategy,
    size=st.sampled_from([64, 128]),
    radius=st.floats(0, 2),
    quality=st.integers(20, 95),
    noise=st.integers(0, 20),
)
def test_every_scene_passes_after_blur_jpeg_and_noise(scene, size, radius, quality, noise):
    image = jpeg(blur(shapes.render(scene.cells, size), radius * size / 64), quality)
    grain = np.random.default_rng(0).normal(0, noise, image.shape)
    assert shapes.check(np.clip(image + grain, 0, 255).astype(np.uint8), scene.prompt.spec)


@settings(max_examples=100, deadline=None)
@given(scene=scene_strategy, cell=st.integers(0, 3), other=st.sampled_from([None, *shapes.ALL_PAIRS]))
def test_any_changed_cell_is_noticed(scene, cell, other):
    """A wrong colour, a wrong shape, an object too many or too few: each is a cell that shows something else."""
    cells = list(scene.cells)
    if cells[cell] == other:
        return
    cells[cell] = other
    assert not shapes.check(blur(shapes.render(tuple(cells), 64), 1.0), scene.prompt.spec)


@pytest.mark.parametrize("relation", shapes.NEIGHBOURS)
def test_every_other_arrangement_fails_a_relation(relation):
    first, second = ("red", "circle"), ("blue", "square")
    (prompt,) = [
        prompt
        for prompt in shapes.prompts("position", "train", 2000, 0)
        if prompt.caption == f"a red circle {relation} a blue square"
    ][:1]
    passed = set()
    for a in range(4):
        for b in range(4):
            if a != b:
                cells = [None] * 4
                cells[a], cells[b] = first, second
                if shapes.check(shapes.render(tuple(cells), 64), prompt.spec):
                    passed.add((a, b))
    assert passed == set(shapes.NEIGHBOURS[relation])


@pytest.mark.parametrize("colour", shapes.COLOURS)
def test_faded_and_half_drawn_objects_are_unclear(colour):
    spec = {"objects": [{"colour": colour, "shape": "circle", "count": 1}], "relation": None}
    image = shapes.render(((colour, "circle"), None, None, None), 64)
    assert shapes.check(image, spec)
    faded = (0.5 * image + 0.5 * 255).astype(np.uint8)
    assert shapes.read_cells(faded)[0] == "unclear"
    assert not shapes.check(faded, spec)
    half = image.copy()
    half[:, :16] = 255
    assert not shapes.check(half, spec)


def test_shuffled_captions_score_low():
    prompts = [p for category in shapes.CATEGORIES for p in shapes.prompts(category, "train", 64, 0)]
    rng = np.random.default_rng(0)
    drawn = [shapes.render(shapes._place(p, random.Random(i)).cells, 64) for i, p in enumerate(prompts)]
    assert all(shapes.check(image, p.spec) for image, p in zip(drawn, prompts, strict=True))
    hits = [shapes.check(drawn[i], prompts[j].spec) for i, j in enumerate(rng.permutation(len(prompts))) if i != j]
    assert np.mean(hits) <= 0.05


def test_heldout_pairs_are_nowhere_in_training():
    heldout = set(shapes.HELDOUT)
    seen = set()
    for split in ("train", "validation"):
        for scene in shapes.scenes(split, 600, seed=3):
            seen |= {cell for cell in scene.cells if cell}
    assert not seen & heldout
    assert seen == set(shapes.SEEN_PAIRS)
    assert {colour for colour, _ in seen} == set(shapes.COLOURS)
    assert {shape for _, shape in seen} == set(shapes.SHAPES)
    for category in shapes.CATEGORIES:
        for prompt in shapes.prompts(category, "heldout", 50, 0):
            assert heldout & {(item["colour"], item["shape"]) for item in prompt.spec["objects"]}
        for prompt in shapes.prompts(category, "train", 50, 0):
            assert not heldout & {(item["colour"], item["shape"]) for item in prompt.spec["objects"]}


def test_validation_scenes_are_not_in_training():
    def placements(split: str) -> set:
        return {(scene.prompt.category, scene.cells) for scene in shapes.scenes(split, 800, seed=4)}

    assert not placements("train") & placements("validation")


def test_deterministic_and_seeded():
    def keys(seed: int) -> list[bytes]:
        return [sample["image_bytes"] for sample in shapes.samples("train", 20, 64, seed)]

    assert keys(0) == keys(0)
    assert keys(0) != keys(1)
    sample = next(shapes.samples("heldout", 1, 64, 0))
    assert sample["metadata"]["source"] == "shapes"
    assert sample["metadata"]["split"] == "heldout"
    assert set(sample["metadata"]["spec"]) == {"objects", "relation", "cells"}


def test_prompts_repeat_evenly():
    drawn = [prompt.caption for prompt in shapes.prompts("single", "heldout", 10, 0)]
    assert sorted(set(drawn)) == sorted(f"a {colour} {shape}" for colour, shape in shapes.HELDOUT)
    assert max(drawn.count(c) for c in drawn) - min(drawn.count(c) for c in drawn) <= 1


def test_bad_arguments_say_what_is_wanted():
    with pytest.raises(ValueError, match="unknown category 'triple'"):
        shapes.prompts("triple", "train", 1, 0)
    with pytest.raises(ValueError, match="unknown split"):
        shapes.prompts("two", "test", 1, 0)
    with pytest.raises(ValueError, match="even size"):
        shapes.render((None,) * 4, 65)
    with pytest.raises(ValueError, match="square uint8 RGB"):
        shapes.read_cells(np.zeros((64, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="square uint8 RGB"):
        shapes.read_cells(np.zeros((64, 64, 3), np.float32))


def test_large_images():
    scene = SCENES[0]
    assert shapes.check(shapes.render(scene.cells, 512), scene.prompt.spec)
