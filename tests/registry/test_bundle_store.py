"""What lies on S3: bundles, copied up, fetched once, verified; clients' files; batches and batch jobs with their images."""

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_run import add_checkpoint, fake_run
from PIL import Image
from s3_support import BUCKET, FaultyProxy
from serving_support import image_of
from tiny_fluid import tiny_pipeline

from fluid_core.config import ServingConfig
from fluid_core.data.storage import open_storage
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.registry.bundle_store import local_bundle, upload_bundle
from fluid_core.registry.models import resolve_model
from fluid_core.registry.promotion import promote
from fluid_core.serving.batches import BatchRunner
from fluid_core.serving.errors import ApiError
from fluid_core.serving.files import FileStore
from fluid_core.serving.gateway import images_response
from fluid_core.serving.ledger import JobLedger
from fluid_core.serving.metrics import ServingMetrics
from fluid_core.serving.provenance import png_bytes
from fluid_core.serving.schema import BatchBody, BatchObject, GenerationBody
from fluid_core.serving.tasks import TaskEvent


def test_up_and_down(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUID_CACHE", str(tmp_path / "cache"))
    pipeline = tiny_pipeline(tmp_path)
    pipeline.save_pretrained(tmp_path / "bundle")
    with pytest.raises(ValueError, match="not a complete model bundle"):
        local_bundle(f"{s3}/bundles/one")
    upload_bundle(tmp_path / "bundle", f"{s3}/bundles/one")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local_bundle(f"{s3}/bundles/one"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and found[0].is_relative_to(tmp_path / "cache")
    fetched = FluidPipeline.from_pretrained(found[0])
    assert fetched(["a red circle"], seed=3)[0].tobytes() == pipeline(["a red circle"], seed=3)[0].tobytes()
    assert local_bundle(str(tmp_path / "bundle")) == tmp_path / "bundle"

    storage = open_storage(f"{s3}/bundles/two")
    upload_bundle(tmp_path / "bundle", f"{s3}/bundles/two")
    storage.put_bytes(b"{}", "config.json", overwrite=True)
    with pytest.raises(ValueError, match=r"config\.json is not the file"):
        local_bundle(f"{s3}/bundles/two")


def test_the_files_of_clients_on_s3(s3: str, tmp_path: Path) -> None:
    store = FileStore(open_storage(f"{s3}/serving"))
    (tmp_path / "upload").write_text(json.dumps({"prompt": "x"}))
    record = store.create(tmp_path / "upload", "/etc/in.jsonl", "batch", "key:ann")
    assert [one.id for one in store.of_owner("key:ann")] == [record.id] and store.of_owner("key:bob") == []
    assert b"".join(store.content(record.id, "key:ann")) == (tmp_path / "upload").read_bytes()
    assert store.fetch(record.id, "key:ann", tmp_path / "down").read_bytes() == (tmp_path / "upload").read_bytes()
    store.delete(record.id, "key:ann")
    with pytest.raises(ApiError, match="404"):
        store.get(record.id, "key:ann")


class Gateways:
    """Batch runners with their state on S3, and real images; `made` has the seed of each image in the order of making."""

    def __init__(self, folder: Path, storage: str):
        self.pipeline = tiny_pipeline(folder)
        self.made: list[int] = []
        self.storage = open_storage(storage)
        self.files = FileStore(self.storage)

    def start(self) -> BatchRunner:
        return BatchRunner(self.storage, self.files, ServingConfig(max_batch_size=4), ServingMetrics(), self.generate)

    async def generate(self, body: GenerationBody) -> dict[str, Any]:
        seed = body.seed or 0
        self.made.append(seed)
        image = await asyncio.to_thread(lambda: self.pipeline([body.prompt], seed=seed, num_steps=1)[0])
        started = {"model": "unit:1", "size": "32x32", "text_tokens": 3, "image_tokens": 16}
        return images_response(started, [TaskEvent("image", png=png_bytes(image), seed=seed)]).model_dump(mode="json")

    async def create(self, runner: BatchRunner, count: int, folder: Path) -> BatchObject:
        lines = [{"custom_id": str(i), "body": {"prompt": "a red circle", "seed": i}} for i in range(count)]
        (folder / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        file = self.files.create(folder / "in.jsonl", "in.jsonl", "batch", "key:ann")
        body = BatchBody(input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h")
        return await runner.create(body, "key:ann")

    async def finish(self, runner: BatchRunner, batch: BatchObject, count: int) -> None:
        """Wait for the batch's end; its output has every line once, in order, with its image."""
        while batch.status != "completed":
            await asyncio.sleep(0.01)
            batch = await runner.get(batch.id, "key:ann")
        assert batch.request_counts.completed == batch.request_counts.total == count
        output = b"".join(self.files.content(batch.output_file_id or "", "key:ann"))
        answers = [json.loads(row) for row in output.splitlines()]
        assert [answer["custom_id"] for answer in answers] == [str(i) for i in range(count)]
        for i in (0, count - 1):
            image = image_of(answers[i]["response"]["body"]["data"][0]["b64_json"])
            assert image.tobytes() == self.pipeline(["a red circle"], seed=i, num_steps=1)[0].tobytes()


def test_a_batch_is_taken_over_by_the_next_gateway(s3: str, tmp_path: Path) -> None:
    """As in a redeploy: the old one leaves off, and nothing committed is made again."""
    gateways = Gateways(tmp_path, f"{s3}/gateway")

    async def run() -> set[int]:
        old, new = gateways.start(), gateways.start()
        batch = await gateways.create(old, 80, tmp_path)
        ledger = JobLedger(gateways.storage, f"batches/{batch.id}")
        while not (committed := set(ledger.committed())):
            await asyncio.sleep(0.01)
        resuming = asyncio.create_task(new.resume_all())
        await gateways.finish(new, batch, 80)
        resuming.cancel()
        return committed

    for chunk in {*asyncio.run(run()), 4}:  # of 16 lines
        assert {gateways.made.count(seed) for seed in range(16 * chunk, 16 * chunk + 16)} == {1}, f"{chunk} was made twice"


def test_a_batch_that_the_old_gateway_took_last_is_not_forgotten(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Created on the old gateway after the new one has looked: free, and taken, when the old one stops."""
    monkeypatch.setattr("fluid_core.serving.batches.PAUSE_SECONDS", 0.05)
    gateways = Gateways(tmp_path, f"{s3}/late")

    async def run() -> None:
        old, new = gateways.start(), gateways.start()
        resuming = asyncio.create_task(new.resume_all())
        await asyncio.sleep(0.2)
        batch = await gateways.create(old, 48, tmp_path)
        while not JobLedger(gateways.storage, f"batches/{batch.id}").committed():
            await asyncio.sleep(0.01)
        await old.stop()
        await gateways.finish(new, batch, 48)
        resuming.cancel()

    asyncio.run(run())


def test_a_batch_waits_out_a_storage_that_is_away(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluid_core.serving.batches.PAUSE_SECONDS", 0.05)
    gateways = Gateways(tmp_path, f"s3://{BUCKET}/away")

    def fault(method: str, path: str) -> str | None:
        return "503" if method == "PUT" and 20 in gateways.made and len(proxy.seen) < 25 else None

    proxy.fault = fault

    async def run() -> None:
        runner = gateways.start()
        await gateways.finish(runner, await gateways.create(runner, 48, tmp_path), 48)

    asyncio.run(run())
    assert len(proxy.seen) == 25 and len(gateways.made) > 48, "the batch never stopped: the storage was not away for long"


def test_a_batch_job_on_another_machine(s3: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promotion to S3, then prompts, model and images all there, in a job with a Ray of its own: nothing local is shared but
    the registry's database."""
    monkeypatch.setenv("FLUID_CACHE", str(tmp_path / "cache"))
    recipe = fake_run(tmp_path, bundles=f"{s3}/promoted")
    add_checkpoint(recipe, 10, loss=0.5, seed=1)
    promoted = promote(recipe)
    ref = resolve_model(None, recipe.registry)
    assert promoted.crowned and ref.label == "unit:1" and ref.path == f"{s3}/promoted/{promoted.bundle.name}"
    expected = FluidPipeline.from_pretrained(promoted.bundle)(["a red circle"], seed=5)[0]
    shutil.rmtree(promoted.bundle)

    lines = [{"prompt": "a red circle", "seed": seed} for seed in range(6)] + [{"prompt": "a red circle", "steps": 999}]
    storage = open_storage(f"{s3}/job")
    storage.put_bytes("\n".join(json.dumps(line) for line in lines).encode(), "prompts.jsonl", overwrite=True)
    command = [sys.executable, str(repository / "pipelines/generate_batch.py"), "--config", str(tmp_path / "recipe.yaml")]
    command += ["--prompts", f"{s3}/job/prompts.jsonl", "--output", f"{s3}/job/out", "--chunk", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    out = open_storage(f"{s3}/job/out")
    summary = json.loads(out.read_or_none("summary.json") or b"")
    assert (summary["images"], summary["failed"], summary["model"]) == (6, 1, "unit:1")
    rows = [json.loads(line) for line in (out.read_or_none("output.jsonl") or b"").splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]
    images = {entry.name for entry in out.list("images/")}
    assert images == {row["image"] for row in rows}
    image = Image.open(io.BytesIO(out.read_or_none(rows[5]["image"]) or b""))
    assert image.tobytes() == expected.tobytes()
    errors = [json.loads(line) for line in (out.read_or_none("errors.jsonl") or b"").splitlines()]
    assert [row["line"] for row in errors] == [7]
