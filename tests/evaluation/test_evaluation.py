"""The scores say 1 for an oracle, 0 for blank paper, and near 0 for the oracle of other captions."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

from fluid_core.config import Recipe
from fluid_core.data import openmoji, shapes
from fluid_core.data.shard_writer import write_shards
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.evaluation import openmoji_score, shapes_score
from fluid_core.evaluation.evaluate import as_table, evaluate, wilson_interval
from fluid_core.evaluation.pictures import TILE, Tile, draw_grid, evenly
from fluid_core.workflow.stage import write_json_atomic

SIZE = 64


@pytest.fixture(scope="module")
def icon_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real icons: ten persons in five tones and some things, prepared as the pipeline does."""
    every = openmoji.list_icons()
    persons = list(dict.fromkeys(icon.base for icon in every if icon.tone in openmoji.TONES))[:60:6]
    some = [icon for icon in every if icon.base in persons] + [icon for icon in every if icon.tone is None][:100:5]
    images = np.stack([openmoji.render(icon, SIZE) for icon in some])
    icons = openmoji.assign_splits(some, images)
    folder = tmp_path_factory.mktemp("openmoji")
    for split in openmoji.SPLITS:
        write_shards(openmoji.samples(icons, images, split), openmoji.split_folder(folder, split), 64)
    write_json_atomic(openmoji.index_path(folder), {"records": openmoji.records(icons)})
    return folder


@pytest.fixture(scope="module")
def icons(icon_folder: Path) -> openmoji_score.Icons:
    return openmoji_score.load_icons(icon_folder)


def blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


def true_scenes(prompts: Sequence[shapes.ScenePrompt]) -> np.ndarray:
    rng = random.Random(0)
    return np.stack([shapes.render(shapes._place(prompt, rng).cells, SIZE) for prompt in prompts])


def test_true_scenes_score_one_and_those_of_other_captions_near_zero() -> None:
    prompts = shapes_score.scene_prompts(16, seed=0)
    for group in ("seen", "heldout"):
        images = true_scenes(prompts[group])
        passed = shapes_score.check_scenes(prompts[group], images)
        metrics = shapes_score.scene_metrics(prompts[group], passed, "shapes/")
        assert metrics == dict.fromkeys(["shapes/single", "shapes/two", "shapes/count", "shapes/position"], 1.0)
    seen = prompts["seen"]
    others = shapes_score.shuffled_prompts(seen, seed=0)
    assert all(a.category == b.category and a.spec != b.spec for a, b in zip(seen, others, strict=True))
    assert np.mean(shapes_score.check_scenes(others, true_scenes(seen))) <= 0.05
    blank = np.full((len(seen), SIZE, SIZE, 3), 255, dtype=np.uint8)
    assert not any(shapes_score.check_scenes(seen, blank))


def test_held_out_prompts_hold_an_unseen_pair_and_seen_ones_do_not() -> None:
    prompts = shapes_score.scene_prompts(8, seed=1)

    def unseen(prompt: shapes.ScenePrompt) -> bool:
        return any((item["colour"], item["shape"]) in shapes.HELDOUT for item in prompt.spec["objects"])

    assert all(unseen(prompt) for prompt in prompts["heldout"]) and not any(unseen(prompt) for prompt in prompts["seen"])


def test_each_icon_is_its_own_nearest_also_when_it_is_soft(icons: openmoji_score.Icons) -> None:
    nearest = openmoji_score.NearestIcon(icons)
    everyone = list(range(len(icons.records)))
    assert all(nearest.hits(icons.images, everyone))
    soft = np.stack([blurred(image) for image in icons.images])
    assert np.mean(nearest.hits(soft, everyone)) > 0.85
    shifted = np.roll(icons.images, 1, axis=0)
    assert np.mean(nearest.hits(shifted, everyone)) < 0.2


def test_one_drawing_under_two_names_counts_as_one(icons: openmoji_score.Icons) -> None:
    records = [dict(record) for record in icons.records]
    records.append(records[0] | {"key": "again", "caption": "the same under another name"})
    more = openmoji_score.Icons(records, np.concatenate([icons.images, icons.images[:1]]))
    assert openmoji_score.NearestIcon(more).hits(more.images[:1], [len(records) - 1]) == [True]


def test_the_tone_probe_reads_true_icons_and_is_not_fooled_by_another_tone(icons: openmoji_score.Icons) -> None:
    probe = openmoji_score.ToneProbe(icons)
    toned = [index for index, record in enumerate(icons.records) if record["tone"] in openmoji.TONES]
    records = [icons.records[index] for index in toned]
    soft = np.stack([blurred(icons.images[index]) for index in toned])
    answers = probe.hits(soft, records)
    assert answers.count(None) < len(answers) / 4
    assert openmoji_score.share(answers) > 0.9
    of_person = {(r["base"], r["tone"]): icons.images[i] for r, i in zip(records, toned, strict=True)}
    wrong = [(of_person[r["base"], "light"], r) for r in records if r["tone"] == "dark" and (r["base"], "light") in of_person]
    fooled = probe.hits(np.stack([image for image, _ in wrong]), [record for _, record in wrong])
    assert openmoji_score.share(fooled) == 0.0
    things = [record for record in icons.records if record["tone"] is None]
    assert probe.hits(icons.images[: len(things)], things) == [None] * len(things)


def test_large_pictures_are_compared_at_64_pixels(icons: openmoji_score.Icons) -> None:
    large = openmoji_score.Icons(icons.records, icons.images.repeat(2, axis=1).repeat(2, axis=2))
    assert all(openmoji_score.NearestIcon(large).hits(large.images, list(range(len(large.records)))))
    assert np.allclose(openmoji_score._features(large.images), openmoji_score._features(icons.images))


def test_icons_that_were_not_prepared_are_named(tmp_path: Path, icon_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prepare_openmoji\.py"):
        openmoji_score.load_icons(tmp_path)
    (tmp_path / "splits.json").write_text((icon_folder / "splits.json").read_text())
    with pytest.raises(ValueError, match="in no shard"):
        openmoji_score.load_icons(tmp_path)


class Oracle:
    """Answers every caption with a true picture of it; stands where FluidPipeline stands."""

    def __init__(self, icons: openmoji_score.Icons, prompts: Sequence[shapes.ScenePrompt], broken: bool = False):
        self.answers = {record["caption"]: image for record, image in zip(icons.records, icons.images, strict=True)}
        self.answers |= {prompt.caption: image for prompt, image in zip(prompts, true_scenes(prompts), strict=True)}
        if broken:
            self.answers = dict(zip(self.answers, np.roll(np.stack(list(self.answers.values())), 7, axis=0), strict=True))
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [8]}
        vae = AutoencoderKL(in_channels=48, out_channels=48, layers_per_block=1, norm_num_groups=4, **blocks)
        self.image_tokenizer = ImageTokenizer(vae, "kl")
        self.seeds: dict[str, list[int]] = {}

    def __call__(self, captions: list[str], seed: list[int]) -> list[Image.Image]:
        for caption, own in zip(captions, seed, strict=True):
            self.seeds.setdefault(caption, []).append(own)
        return [Image.fromarray(self.answers[caption]) for caption in captions]


def recipe_for(icon_folder: Path, tmp_path: Path, batch_size: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "oracle",
            "runs_dir": str(tmp_path),
            "data": {
                "image_size": SIZE,
                "openmoji": {"output": str(icon_folder)},
                "shapes": {"output": str(tmp_path / "shapes")},
            },
            "image_tokenizer": {"path": "unused"},
            "text_encoder": {"path": "unused"},
            "encode": {"output": "unused"},
            "evaluation": {"shapes_prompts_per_category": 6, "openmoji_prompts": 20, "batch_size": batch_size},
        }
    )


def test_the_whole_evaluation_of_an_oracle_and_of_a_liar(
    icons: openmoji_score.Icons, icon_folder: Path, tmp_path: Path
) -> None:
    every = [p for group in shapes_score.scene_prompts(6, seed=0).values() for p in group]
    oracle = Oracle(icons, every)
    result = evaluate(oracle, recipe_for(icon_folder, tmp_path, batch_size=7))  # type: ignore[arg-type]
    perfect = ["shapes/single", "shapes/two", "shapes/count", "shapes/position", "shapes/seen", "shapes/heldout"]
    perfect += ["openmoji/train_top1", "openmoji/heldout_top1", "openmoji/heldout_tone"]
    assert {name: result.metrics[name] for name in perfect} == dict.fromkeys(perfect, 1.0)
    assert result.metrics["shapes/shuffled"] <= 0.1
    assert (
        result.samples["shapes/seen"] == 24
        and result.samples["shapes/two"] == 6
        and result.samples["openmoji/train_top1"] == 20
    )
    # The random tokenizer of this test keeps nothing of a picture, and the ceiling says so.
    assert result.metrics["vae/shapes_seen"] == 0.0 and result.metrics["vae/openmoji_train_top1"] < 0.5
    assert set(result.pictures) == {"samples.png", "shapes.png", "openmoji.png", "vae.png"}

    again = Oracle(icons, every)
    evaluate(again, recipe_for(icon_folder, tmp_path, batch_size=64))  # type: ignore[arg-type]
    assert again.seeds == oracle.seeds, "a picture's seed must not depend on the batch size"

    liar = evaluate(Oracle(icons, every, broken=True), recipe_for(icon_folder, tmp_path, 64))  # type: ignore[arg-type]
    assert liar.metrics["shapes/seen"] < 0.2 and liar.metrics["openmoji/train_top1"] < 0.2


def test_a_recipe_without_data_to_score_on_is_refused(icon_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(icon_folder, tmp_path, 8)
    recipe.data.shapes = recipe.data.openmoji = None
    with pytest.raises(ValueError, match=r"neither"):
        evaluate(None, recipe)  # type: ignore[arg-type]


def test_intervals_and_tables() -> None:
    low, high = wilson_interval(0.9, 100)
    assert 0.82 < low < 0.9 < high < 0.95
    assert wilson_interval(1.0, 64)[1] == 1.0 and wilson_interval(0.0, 64)[0] == 0.0
    rows = as_table({"a/top1": 0.5, "a/psnr": 24.0}, {"a/top1": 10, "a/psnr": 10})
    assert rows[0]["interval"] is not None and rows[1]["interval"] is None


def test_grids_hold_every_tile_and_frame_the_wrong_ones() -> None:
    red = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    red[..., 0] = 200
    grid = np.asarray(draw_grid([("title", [Tile(red, "right", True), Tile(red, "wrong", False)])], columns=2))
    area = (np.abs(grid.astype(int) - [200, 0, 0]).sum(axis=-1) == 0).sum()
    assert area == 2 * TILE * TILE
    frame = (np.abs(grid.astype(int) - [0xC6, 0x2A, 0x2F]).sum(axis=-1) == 0).sum()
    assert frame > 4 * TILE
    assert evenly(100, 4) == [0, 25, 50, 75] and evenly(2, 8) == [0, 1]
