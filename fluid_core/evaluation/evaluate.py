"""Score a model bundle through FluidPipeline: generate for every prompt, check, and draw what came out.

The same checks on the image tokenizer's reconstructions of the true pictures (vae/...) say what the tokenizer allows at best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fluid_core.config import Recipe
from fluid_core.data import shapes
from fluid_core.data.openmoji import ATTRIBUTION
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.evaluation import openmoji_score as icons_score
from fluid_core.evaluation import shapes_score
from fluid_core.evaluation.pictures import Tile, draw_grid, evenly
from fluid_core.workflow.stage import write_json_atomic

if TYPE_CHECKING:
    from fluid_core.generation.pipeline import FluidPipeline


@dataclass
class Evaluation:
    """metrics: flat name -> value; samples: how many answers stand behind each; pictures: file name -> picture."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    sections: list[tuple[str, list[Tile]]] = field(default_factory=list)

    def save(self, folder: Path, **about: Any) -> None:
        """Write metrics.json (with `about`), the grids, and samples.json with one small PNG for each sample shown."""
        small = folder / "samples"
        small.mkdir(parents=True, exist_ok=True)
        listing: list[dict[str, Any]] = []
        for title, tiles in self.sections:
            rows: list[dict[str, Any]] = []
            for tile in tiles:
                name = f"{len(listing)}-{len(rows):02d}.png"
                Image.fromarray(tile.image).save(small / name)
                rows.append({"file": f"samples/{name}", "caption": tile.caption, "right": tile.right})
            listing.append({"title": title, "tiles": rows})
        for name, picture in self.pictures.items():
            picture.save(folder / name)
        write_json_atomic(folder / "samples.json", listing)
        write_json_atomic(
            folder / "metrics.json", about | {"metrics": self.metrics, "table": as_table(self.metrics, self.samples)}
        )

    def add(self, metrics: dict[str, float], samples: int) -> None:
        known = {name: value for name, value in metrics.items() if not math.isnan(value)}
        self.metrics |= known
        self.samples |= dict.fromkeys(known, samples)


def evaluate(pipeline: "FluidPipeline", recipe: Recipe) -> Evaluation:
    """Everything that the recipe's data sections allow. Deterministic for one bundle and `evaluation.seed`.

    Raises:
        ValueError: the recipe has neither data.shapes nor data.openmoji.
    """
    if recipe.data.shapes is None and recipe.data.openmoji is None:
        raise ValueError("evaluation scores on data.shapes and data.openmoji: the recipe has neither")
    result = Evaluation()
    if recipe.data.shapes is not None:
        _shapes(pipeline, recipe, result)
    if recipe.data.openmoji is not None:
        _openmoji(pipeline, recipe, result)
    result.pictures["samples.png"] = draw_grid(result.sections)
    return result


def generate(pipeline: "FluidPipeline", captions: Sequence[str], recipe: Recipe, description: str) -> np.ndarray:
    """Pictures for captions, uint8 (n, S, S, 3); picture i has the seed `evaluation.seed` + i whatever the batch size."""
    section, pictures = recipe.evaluation, []
    with tqdm(total=len(captions), desc=description, unit="image") as bar:
        for start in range(0, len(captions), section.batch_size):
            batch = list(captions[start : start + section.batch_size])
            seeds = [section.seed + start + offset for offset in range(len(batch))]
            pictures += [np.asarray(image.convert("RGB")) for image in pipeline(batch, seed=seeds)]
            bar.update(len(batch))
    return np.stack(pictures)


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """What the image tokenizer makes of true pictures: uint8 (n, S, S, 3) in and out."""
    out = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        codes = tokenizer.encode(batch)
        decoded = tokenizer.decode(codes if tokenizer.kind == "vq" else codes[:, : tokenizer.latent_channels])
        out.append(((decoded.cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def _shapes(pipeline: "FluidPipeline", recipe: Recipe, result: Evaluation) -> None:
    section = recipe.evaluation
    prompts = shapes_score.scene_prompts(section.shapes_prompts_per_category, section.seed)
    both = prompts["seen"] + prompts["heldout"]
    images = generate(pipeline, [prompt.caption for prompt in both], recipe, "shapes")
    passed = shapes_score.check_scenes(both, images)
    seen = len(prompts["seen"])
    for part, prefix, total in (
        (slice(0, seen), "shapes/", "shapes/seen"),
        (slice(seen, None), "shapes/heldout_", "shapes/heldout"),
    ):
        result.add(shapes_score.scene_metrics(both[part], passed[part], prefix), section.shapes_prompts_per_category)
        result.add({total: float(np.mean(passed[part]))}, len(both[part]))
    control = shapes_score.check_scenes(shapes_score.shuffled_prompts(prompts["seen"], section.seed), images[:seen])
    result.add({"shapes/shuffled": float(np.mean(control))}, seen)

    scenes = [*shapes.scenes("validation", seen, section.seed), *shapes.scenes("heldout", len(both) - seen, section.seed)]
    true = np.stack([shapes.render(scene.cells, recipe.data.image_size) for scene in scenes])
    again = reconstruct(pipeline.image_tokenizer, true)
    right = shapes_score.check_scenes([scene.prompt for scene in scenes], again)
    result.add({"vae/shapes_seen": float(np.mean(right[:seen])), "vae/shapes_psnr": icons_score.psnr(again, true)}, seen)
    result.add({"vae/shapes_heldout": float(np.mean(right[seen:]))}, len(both) - seen)

    tiles = [Tile(image, prompt.caption, ok) for image, prompt, ok in zip(images, both, passed, strict=True)]
    result.sections.append(("Shapes: colour-shape pairs seen in training", [tiles[i] for i in evenly(seen, 8)]))
    result.sections.append(("Shapes: pairs never seen", [tiles[seen + i] for i in evenly(len(both) - seen, 8)]))
    result.pictures["shapes.png"] = draw_grid(
        [
            ("Colour-shape pairs seen in training", [tiles[i] for i in evenly(seen, 32)]),
            ("Pairs never seen in training", [tiles[seen + i] for i in evenly(len(both) - seen, 32)]),
        ]
    )


def _openmoji(pipeline: "FluidPipeline", recipe: Recipe, result: Evaluation) -> None:
    section = recipe.evaluation
    assert recipe.data.openmoji is not None
    icons = icons_score.load_icons(recipe.data.openmoji.output)
    chosen = {
        "train": icons_score.choose_training_icons(icons, section.openmoji_prompts, section.seed),
        "heldout": icons.of_split("heldout"),
    }
    targets = chosen["train"] + chosen["heldout"]
    records = [icons.records[index] for index in targets]
    images = generate(pipeline, [record["caption"] for record in records], recipe, "OpenMoji")
    nearest, probe = icons_score.NearestIcon(icons), icons_score.ToneProbe(icons)
    again = reconstruct(pipeline.image_tokenizer, icons.images[targets])
    tiles: dict[str, list[Tile]] = {}
    for split, part in (("train", slice(0, len(chosen["train"]))), ("heldout", slice(len(chosen["train"]), None))):
        some = targets[part]
        hits = nearest.hits(images[part], some)
        for prefix, pictures in (("openmoji/", images[part]), ("vae/openmoji_", again[part])):
            tones = probe.hits(pictures, records[part])
            result.add({f"{prefix}{split}_top1": icons_score.share(nearest.hits(pictures, some))}, len(some))
            result.add({f"{prefix}{split}_tone": icons_score.share(tones)}, sum(tone is not None for tone in tones))
            result.add({f"{prefix}{split}_psnr": icons_score.psnr(pictures, icons.images[some])}, len(some))
        tiles[split] = [Tile(i, r["caption"], ok) for i, r, ok in zip(images[part], records[part], hits, strict=True)]

    attribution = f"after {ATTRIBUTION}"
    memorised, composed = "captions of training icons (memorisation)", "tone and person never seen together (composition)"
    result.sections.append(
        (f"OpenMoji: {memorised}; {attribution}", [tiles["train"][i] for i in evenly(len(chosen["train"]), 16)])
    )
    result.sections.append((f"OpenMoji: {composed}", [tiles["heldout"][i] for i in evenly(len(chosen["heldout"]), 16)]))
    result.pictures["openmoji.png"] = draw_grid(
        [
            (f"OpenMoji, {memorised}: generated, then the icon; {attribution}", _pairs(tiles["train"], icons, chosen["train"])),
            (f"OpenMoji, {composed}: generated, then the icon", _pairs(tiles["heldout"], icons, chosen["heldout"])),
        ]
    )
    offset = len(chosen["train"])
    originals = [
        (Tile(icons.images[targets[i]], "icon"), Tile(again[i], "reconstruction"))
        for i in evenly(offset, 16) + [offset + i for i in evenly(len(targets) - offset, 16)]
    ]
    title = f"Image tokenizer: icon, then its reconstruction; {ATTRIBUTION}"
    result.pictures["vae.png"] = draw_grid([(title, list(chain.from_iterable(originals)))])


def _pairs(tiles: Sequence[Tile], icons: icons_score.Icons, targets: Sequence[int], number: int = 32) -> list[Tile]:
    chosen = evenly(len(tiles), number)
    return list(chain.from_iterable((tiles[i], Tile(icons.images[targets[i]], "the icon")) for i in chosen))


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """95% interval of a share that was counted over `samples` answers."""
    z = 1.96
    middle = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def as_table(metrics: dict[str, float], samples: dict[str, int]) -> list[dict[str, Any]]:
    """One row a metric: name, value, samples, and for shares the 95% interval."""
    rows = []
    for name, value in metrics.items():
        interval = None if name.endswith("psnr") else wilson_interval(value, samples[name])
        rows.append({"metric": name, "value": round(value, 4), "samples": samples[name], "interval": interval})
    return rows
