"""Shape scenes, scored by the exact checker of data/shapes.py: GenEval in small.

Metrics: shapes/<category> (pairs seen in training), shapes/seen (all four together), shapes/heldout_<category> and
shapes/heldout (prompts with a colour-shape pair that no training scene has), shapes/shuffled (the control: each picture
checked against the prompt of another; a checker or a model that says yes to everything shows here).
"""

import random
from collections.abc import Sequence

import numpy as np

from fluid_core.data import shapes
from fluid_core.data.shapes import CATEGORIES, ScenePrompt


def scene_prompts(per_category: int, seed: int) -> dict[str, list[ScenePrompt]]:
    """`per_category` prompts of each category, "seen" and "heldout"."""
    return {
        "seen": [prompt for category in CATEGORIES for prompt in shapes.prompts(category, "validation", per_category, seed)],
        "heldout": [prompt for category in CATEGORIES for prompt in shapes.prompts(category, "heldout", per_category, seed)],
    }


def check_scenes(prompts: Sequence[ScenePrompt], images: np.ndarray) -> list[bool]:
    """For each picture, uint8 (n, S, S, 3), whether it shows exactly what its prompt says."""
    return [shapes.check(image, prompt.spec) for prompt, image in zip(prompts, images, strict=True)]


def scene_metrics(prompts: Sequence[ScenePrompt], passed: Sequence[bool], prefix: str) -> dict[str, float]:
    """Share of right pictures in each category: `<prefix><category>`."""
    metrics = {}
    for category in CATEGORIES:
        of_category = [ok for prompt, ok in zip(prompts, passed, strict=True) if prompt.category == category]
        if of_category:
            metrics[f"{prefix}{category}"] = float(np.mean(of_category))
    return metrics


def shuffled_prompts(prompts: Sequence[ScenePrompt], seed: int) -> list[ScenePrompt]:
    """Each prompt replaced by another one of its category that says something else."""
    rng = random.Random(seed)
    shuffled = []
    for prompt in prompts:
        others = [other for other in prompts if other.category == prompt.category and other.spec != prompt.spec]
        assert others, f"all prompts of {prompt.category} are alike"
        shuffled.append(rng.choice(others))
    return shuffled
