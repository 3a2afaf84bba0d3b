"""The replica's side without Ray: the safety hook, pinned versions, edits, the alias that it follows."""

import asyncio
import io
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving_support import small_recipe
from tiny_fluid import tiny_pipeline

from fluid_core.registry.model_registry import ModelRegistry
from fluid_core.registry.models import CHAMPION, ModelRef
from fluid_core.serving import generator as module
from fluid_core.serving.edits import _natural_size
from fluid_core.serving.generator import Generator
from fluid_core.serving.provenance import read_provenance
from fluid_core.serving.requests import ServedModel
from fluid_core.serving.safety import BlockList
from fluid_core.serving.schema import ModelInfo
from fluid_core.serving.tasks import ImageTask, TaskEvent


class RefusesAll(BlockList):
    def check_image(self, image: Image.Image, prompt: str, user: str | None) -> str | None:
        return "never"


def _bundle(folder: Path, **serving: Any) -> Any:
    tiny_pipeline(folder / "made").save_pretrained(folder / "bundle")
    return small_recipe(folder, model=str(folder / "bundle"), **serving).model_dump(mode="json")


def _events(replica: Generator, task: ImageTask) -> list[TaskEvent]:
    return asyncio.run(replica.generate(task, 60.0))


def test_no_preview_passes_a_hook_that_refuses_the_image(tmp_path: Path) -> None:
    task = ImageTask("a red circle", 1, seed=0, steps=4, stream=True, partial_images=3)
    replica = Generator(_bundle(tmp_path, safety_hook=f"{__name__}:RefusesAll"))
    assert [event.kind for event in _events(replica, task)] == ["started", "error"]


def test_a_preview_says_where_it_comes_from_and_a_pinned_version_is_refused_by_another(tmp_path: Path) -> None:
    replica = Generator(_bundle(tmp_path))
    task = ImageTask("a red circle", 1, seed=3, steps=4, stream=True, partial_images=1)
    preview = next(event for event in _events(replica, task) if event.kind == "partial")
    found = read_provenance(Image.open(io.BytesIO(preview.png)))
    assert found["prompt"] == "a red circle" and found["seed"] == 3 and found["settings"]["num_steps"] == 4
    assert [event.kind for event in _events(replica, ImageTask("a", 1, seed=0, steps=1, model="bundle"))][-1] == "done"
    (error,) = _events(replica, ImageTask("a", 1, seed=0, steps=1, model="bundle:7"))
    assert (
        error.details is not None and error.details["status"] == 404 and "'bundle:7' is not served" in error.details["message"]
    )


def test_an_edit_of_many_images_encodes_its_picture_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path)
    tiny_pipeline(tmp_path / "made").save_pretrained(tmp_path / "bundle")
    served = ServedModel(ModelRef("unit", None, None, str(tmp_path / "bundle")), recipe)
    calls = []
    encode = served.pipeline.encode_image
    monkeypatch.setattr(served.pipeline, "encode_image", lambda image: calls.append(image) or encode(image))
    picture, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    half.save(mask, "PNG")
    task = ImageTask("a red circle", 3, seed=5, image=picture.getvalue(), mask=mask.getvalue())
    assert [request.seed for request in served.requests(task)] == [5, 6, 7] and len(calls) == 1


def test_a_champion_that_could_not_be_loaded_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bundle comes late, as from a store that was away for a while."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.1)
    recipe = small_recipe(tmp_path, follow_alias_seconds=0.05)
    registry = ModelRegistry(recipe.registry)
    registry.ensure("unit")
    for version in ("1", "2"):
        registry.client.create_model_version("unit", source=str(tmp_path / version))
    tiny_pipeline(tmp_path / "made").save_pretrained(tmp_path / "1")
    registry.client.set_registered_model_alias("unit", CHAMPION, "1")
    replica = Generator(recipe.model_dump(mode="json"))
    registry.client.set_registered_model_alias("unit", CHAMPION, "2")
    time.sleep(0.5)
    assert replica.describe()["version"] == "1"
    shutil.copytree(tmp_path / "1", tmp_path / "late")
    (tmp_path / "late").rename(tmp_path / "2")
    deadline = time.monotonic() + 30
    while replica.describe()["version"] == "1":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_edit_keeps_the_proportions_of_its_picture() -> None:
    info = ModelInfo(
        id="unit", created=0, image_size="256x256", size_multiple=16, grid=[16, 16], max_prompt_tokens=8, defaults={}
    )  # fmt: skip
    assert _natural_size((512, 128), info, 2048) == (512, 128)
    assert _natural_size((1000, 501), info, 2048) == (368, 176)
    assert _natural_size((1001, 7), info, 2048) == (2048, 16)
