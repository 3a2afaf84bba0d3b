"""OpenMoji, scored without a model: is the right icon the nearest of all, and is the skin tone right?

Top-1 for captions of training icons measures memorisation; for tone x person combinations that no training icon has it
measures composition. Icons that are one drawing under several names (`image_id`) count as one.

Legend: n pictures, S side in pixels, M distinct icons.
"""

import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from fluid_core.data.openmoji import SPLITS, TONES, index_path, split_folder

COMPARE_SIDE = 64
"""Pictures are compared at this size at most: larger ones are averaged down."""
SKIN_DIFFERENCE = 24
"""Grey levels by which a pixel must change from one tone to another to be called skin."""
MINIMUM_SKIN_PIXELS = 6


@dataclass(frozen=True)
class Icons:
    """All prepared icons: records as in splits.json, images uint8 (len(records), S, S, 3)."""

    records: list[dict[str, Any]]
    images: np.ndarray

    def of_split(self, split: str) -> list[int]:
        return [index for index, record in enumerate(self.records) if record["split"] == split]


def load_icons(folder: str | Path) -> Icons:
    """Read what pipelines/prepare_openmoji.py wrote.

    Raises:
        FileNotFoundError: it has not run.
        ValueError: splits.json names icons that the shards lack.
    """
    path = index_path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run pipelines/prepare_openmoji.py with this recipe")
    records = json.loads(path.read_text())["records"]
    pictures: dict[str, np.ndarray] = {}
    for split in SPLITS:
        for shard in sorted(split_folder(folder, split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(".png"):
                        file = tar.extractfile(member)
                        assert file is not None
                        image = Image.open(io.BytesIO(file.read())).convert("RGB")
                        pictures[member.name.removesuffix(".png")] = np.asarray(image)
    missing = [record["key"] for record in records if record["key"] not in pictures]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} icons of splits.json are in no shard, first {missing[0]}: prepare it again")
    return Icons(records, np.stack([pictures[record["key"]] for record in records]))


def choose_training_icons(icons: Icons, number: int, seed: int) -> list[int]:
    """`number` icons of the training split, drawn evenly."""
    training = icons.of_split("train")
    return sorted(random.Random(seed).sample(training, min(number, len(training))))


class NearestIcon:
    """Nearest of all distinct icons in mean squared pixel distance."""

    def __init__(self, icons: Icons):
        first: dict[str, int] = {}
        for index, record in enumerate(icons.records):
            first.setdefault(record["image_id"], index)
        self._records = icons.records
        self._index = np.array(list(first.values()))
        self._features_MF = _features(icons.images[self._index])
        self._norms_M = (self._features_MF**2).sum(axis=1)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) -> the record index of each one's nearest icon, (n,)."""
        features_nF = _features(images)
        # |a - b|^2 without |a|^2, which is the same for every candidate.
        distance_nM = self._norms_M[None, :] - 2.0 * features_nF @ self._features_MF.T
        return self._index[distance_nM.argmin(axis=1)]

    def hits(self, images: np.ndarray, targets: Sequence[int]) -> list[bool]:
        """Whether each picture's nearest icon is its target, or the same drawing under another name."""
        found = self(images)
        return [self._records[f]["image_id"] == self._records[t]["image_id"] for f, t in zip(found, targets, strict=True)]


class ToneProbe:
    """The skin tone of a picture of a known person, by the mean colour of the skin area.

    The skin area is where that person's icons of different tones differ, without its rim; the answer is the tone whose icon
    has the nearest mean colour there.
    """

    def __init__(self, icons: Icons):
        self._images = icons.images
        self._by_base: dict[str, dict[str, int]] = defaultdict(dict)
        for index, record in enumerate(icons.records):
            if record["tone"] in TONES:
                self._by_base[record["base"]][record["tone"]] = index

    def __call__(self, image: np.ndarray, base: str) -> str | None:
        """uint8 (S, S, 3) and the person -> the tone; None when the icons of this person do not tell tones apart."""
        tones = self._by_base.get(base, {})
        pictures = np.stack([self._images[index] for index in tones.values()]).astype(np.float32) if len(tones) > 1 else None
        if pictures is None:
            return None
        skin = (pictures.max(axis=0) - pictures.min(axis=0)).max(axis=-1) >= SKIN_DIFFERENCE
        if not skin.any():
            return None
        skin = _interior(skin)
        wanted = pictures[:, skin].mean(axis=1)
        distance = ((wanted - image.astype(np.float32)[skin].mean(axis=0)) ** 2).sum(axis=1)
        return list(tones)[int(distance.argmin())]

    def hits(self, images: np.ndarray, records: Sequence[dict[str, Any]]) -> list[bool | None]:
        """For each picture whether the tone is right; None where its icon has no single tone or shows none."""
        answers: list[bool | None] = []
        for image, record in zip(images, records, strict=True):
            answer = self(image, record["base"]) if record["tone"] in TONES else None
            answers.append(None if answer is None else answer == record["tone"])
        return answers


def _interior(skin: np.ndarray) -> np.ndarray:
    """Without its rim, as long as enough is left: in a soft picture the black outline darkens the skin beside it."""
    for _ in range(max(1, 2 * skin.shape[0] // 64)):
        eroded = np.asarray(Image.fromarray(skin.astype(np.uint8)).filter(ImageFilter.MinFilter(3))).astype(bool)
        if eroded.sum() < MINIMUM_SKIN_PIXELS:
            break
        skin = eroded
    return skin


def share(answers: Sequence[bool | None]) -> float:
    """Share of right answers among those that could be asked; nan when there is none."""
    asked = [answer for answer in answers if answer is not None]
    return float(np.mean(asked)) if asked else float("nan")


def psnr(images: np.ndarray, targets: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB of uint8 (n, S, S, 3) pictures."""
    error = ((images.astype(np.float32) - targets.astype(np.float32)) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255.0**2 / np.maximum(error, 1e-3))).mean())


def _features(images: np.ndarray) -> np.ndarray:
    side = images.shape[1]
    factor = max(1, side // COMPARE_SIDE)
    pixels = images.astype(np.float32) / 255.0
    if factor > 1:
        small = side // factor
        pixels = (
            pixels[:, : small * factor, : small * factor].reshape(len(images), small, factor, small, factor, 3).mean((2, 4))
        )
    return pixels.reshape(len(images), -1)
