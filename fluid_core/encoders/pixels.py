"""Training images of the tokenizer: decoded once, kept as uint8 in one file that every worker maps into memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fluid_core.data.decode import BadImage, DecodeOptions, DroppedImage, decode_image
from fluid_core.data.reader import read_tar
from fluid_core.data.samples import RawSample

MAX_BYTES = 8 << 30
"""Enough for 170,000 images of 128 px; from larger sources the first of every shard are taken, evenly."""


@dataclass(frozen=True)
class PixelSet:
    """Images of one data set: uint8 (n, 3, S, S), and the name that their metadata gives them."""

    name: str
    images: Tensor


def list_tars(sources: list[str], what: str) -> list[Path]:
    """Local tars named by globs, folders or `WEIGHT::glob`, each once, in order of their names within a source."""
    paths: dict[Path, None] = {}
    for source in sources:
        pattern = source.split("::", 1)[-1]
        found = sorted(Path(path) for path in glob(f"{pattern}/*.tar" if Path(pattern).is_dir() else pattern))
        if not found:
            raise ValueError(f"{what}: no local tar matches {pattern}; prepare the data first, or name a pre-trained tokenizer")
        paths.update(dict.fromkeys(found))
    return list(paths)


def collect_pixels(tars: list[Path], image_size: int, folder: Path) -> tuple[list[str], int]:
    """Decode the images of `tars` into `folder`/NAME.npy, one file a data set (metadata's `source`, else "images").

    Returns:
        (the names, the number of samples set aside because they could not be decoded).
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = max(1, MAX_BYTES // (3 * image_size**2) // len(tars))
    found: dict[str, list[np.ndarray]] = {}
    bad = 0
    for tar in tqdm(tars, desc="decoding images", unit="shard"):
        for name, image in _decode_tar(tar, image_size, per_shard):
            if image is None:
                bad += 1
            else:
                found.setdefault(name, []).append(image)
    if not found:
        raise ValueError(f"image_tokenizer.train: none of the images in {len(tars)} shards can be decoded")
    for name, images in found.items():
        np.save(folder / f"{name}.npy", np.stack(images).transpose(0, 3, 1, 2))
    return sorted(found), bad


def open_pixels(folder: Path, names: list[str]) -> list[PixelSet]:
    """Map what `collect_pixels` wrote."""
    # torch warns about read-only memory; nothing writes to these, and "c" keeps the file safe if something did.
    return [PixelSet(name, torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))) for name in names]


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def _decode_tar(tar: Path, image_size: int, limit: int) -> Iterator[tuple[str, np.ndarray | None]]:
    options = DecodeOptions(image_size)
    for count, sample in enumerate(read_tar(tar)):
        if count >= limit:
            return
        if not isinstance(sample, RawSample):
            yield "", None
            continue
        try:
            yield str(sample.metadata.get("source", "images")), decode_image(sample.image, options).pixels_HW3
        except (BadImage, DroppedImage):
            yield "", None
