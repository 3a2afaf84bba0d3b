"""pipelines/generate_batch.py: the job or its actors killed; every line once, errors kept apart. On S3: tests/registry."""

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Program
from PIL import Image
from serving_support import difference, small_recipe
from tiny_fluid import tiny_pipeline

from fluid_core.config import GenerationConfig, Recipe
from fluid_core.data.storage import open_storage
from fluid_core.registry.models import resolve_model
from fluid_core.serving.offline import OfflineJob, make_chunk
from fluid_core.serving.provenance import read_provenance
from fluid_core.serving.requests import ServedModel
from fluid_core.serving.safety import BlockList

LINES = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offline")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    pipeline = tiny_pipeline(folder)
    pipeline.save_pretrained(folder / "bundle")
    return small_recipe(folder, model=str(folder / "bundle"), max_batch_size=4, cost_per_replica_hour=3.6)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    lines: list[Any] = [{"prompt": "a red circle", "seed": i, "steps": 2 + i % 3} for i in range(LINES)]
    lines[5] = {"custom_id": "openai", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a apple"}}
    lines[6] = {"prompt": "a red circle", "size": "48x32", "seed": 1}
    lines[10] = {"prompt": "a red circle", "steps": 500}
    lines[11] = {"prompt": "circle " * 50}
    lines[12] = {"prompt": "csam"}
    text = "\n".join("{poison" if i == 13 else json.dumps(line) for i, line in enumerate(lines))
    path = folder / "prompts.jsonl"
    path.write_text(text + "\n")
    return path


def digests(output: Path) -> dict[str, str]:
    """Every file of a finished job but those that hold times."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.rglob("*")
        if path.is_file() and path.parts[-2] not in ("_ledger", "_tmp") and path.name != "summary.json"
    }


def test_killed_and_run_again_every_line_is_done_once(
    ray_session: str, recipe: Recipe, folder: Path, prompts: Path, repository: Path
) -> None:
    output = folder / "out"
    script = str(repository / "pipelines/generate_batch.py")
    arguments = ["--config", str(folder / "recipe.yaml"), "--prompts", str(prompts), "--output", str(output), "--chunk", "4"]
    job = Program([script, *arguments], folder / "killed.log")
    until = time.monotonic() + 300
    while len(list(output.glob("_ledger/*.json"))) < 2 and job.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    job.kill()
    job.wait()
    before = len(list(output.glob("_ledger/*.json")))
    assert before >= 2, job.output()

    summary = OfflineJob(recipe, str(prompts), str(output), 4).run()
    assert (summary["rows"], summary["images"], summary["failed"]) == (LINES, LINES - 4, 4)
    assert summary["cost"] > 0
    rows = [json.loads(line) for line in (output / "output.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [i + 1 for i in range(LINES) if i not in (10, 11, 12, 13)]
    errors = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
    assert [(row["line"], row["error"]["code"]) for row in errors] == [
        (11, "invalid_value"), (12, "invalid_value"), (13, "content_policy_violation"), (14, "invalid_json_line"),
    ]  # fmt: skip
    pipeline = tiny_pipeline(folder / "again")
    for index in (0, 6, 63):
        row = next(row for row in rows if row["line"] == index + 1)
        image = Image.open(output / row["image"])
        size = (48, 32) if index == 6 else None
        steps = None if index == 6 else 2 + index % 3
        assert difference(image, pipeline(["a red circle"], seed=row["seed"], num_steps=steps, size=size)[0]) <= 1
        assert (read_provenance(image) or {})["seed"] == row["seed"]
    assert rows[5]["custom_id"] == "openai" and len(list(output.rglob("*.png"))) == LINES - 4

    # Lost ledger entries and half a chunk: the same files come again.
    whole = digests(output)
    (output / "_ledger/000003.json").unlink()
    shutil.rmtree(output / "images/000003")
    next((output / "output").glob("000003-*.jsonl")).write_text("half a li")
    OfflineJob(recipe, str(prompts), str(output), 4).run()
    assert digests(output) == whole

    prompts_of_another = folder / "other.jsonl"
    prompts_of_another.write_text('{"prompt": "a apple"}\n')
    with pytest.raises(ValueError, match="another prompts"):
        OfflineJob(recipe, str(prompts_of_another), str(output)).run()
    with pytest.raises(ValueError, match="does not exist"):
        OfflineJob(recipe, str(folder / "absent.jsonl"), str(folder / "out2")).run()


def workers() -> list[psutil.Process]:
    """The processes of this session's Ray that hold a batch job's model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::MapWorker(MapBatches(ChunkActor))"):
                found.append(process)
    return found


def test_killed_actors_are_replaced_and_nothing_is_made_twice(ray_session: str, recipe: Recipe, folder: Path) -> None:
    prompts, output = folder / "many.jsonl", folder / "killed"
    prompts.write_text("".join(json.dumps({"prompt": "a red circle", "seed": i, "steps": 8}) + "\n" for i in range(LINES)))
    job = OfflineJob(recipe, str(prompts), str(output), 4)
    killed: set[int] = set()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job.run)
        # One before the first chunk is done, as far as can be timed, and one later.
        for least in (0, 4):
            until = time.monotonic() + 120
            while time.monotonic() < until and not running.done():
                found = [process for process in workers() if process.pid not in killed]
                if found and len(list(output.glob("_ledger/*.json"))) >= least:
                    found[0].kill()
                    killed.add(found[0].pid)
                    break
                time.sleep(0.02)
        summary = running.result(timeout=300)
    assert len(killed) == 2
    assert (summary["rows"], summary["images"], summary["failed"]) == (LINES, LINES, 0)
    rows = [json.loads(line) for line in (output / "output.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, LINES + 1)) and [row["seed"] for row in rows] == list(range(LINES))
    assert all(hashlib.sha256((output / row["image"]).read_bytes()).hexdigest() == row["sha256"] for row in rows)
    assert len(list(output.rglob("*.png"))) == LINES and len(list(output.glob("_ledger/*.json"))) == LINES // 4


def test_a_line_whose_image_comes_out_nan_is_an_error_of_its_own(tmp_path: Path) -> None:
    """The bundle's own guidance is absurd here; one line takes it."""
    generation = GenerationConfig(num_steps=4, head_steps=2, guidance_scale=1e38, solver="euler")
    tiny_pipeline(tmp_path, generation=generation).save_pretrained(tmp_path / "bundle")
    recipe = small_recipe(tmp_path, model=str(tmp_path / "bundle"))
    served = ServedModel(resolve_model(recipe.serving.model, recipe.registry), recipe)
    lines = [json.dumps({"prompt": "a red circle", "seed": i} | ({} if i == 1 else {"guidance": 2})).encode() for i in range(3)]
    good, bad = make_chunk(served, BlockList(), recipe, open_storage(str(tmp_path / "out")), 0, 0, lines, "job")
    assert [row["line"] for row in good] == [1, 3]
    assert [(row["line"], row["error"]["code"]) for row in bad] == [(2, "generation_failed")]
