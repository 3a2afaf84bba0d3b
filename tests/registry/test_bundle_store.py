"""Bundles that lie on S3: copied up, fetched once, verified."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_run import add_checkpoint, fake_run
from PIL import Image
from tiny_fluid import tiny_pipeline

from fluid_core.data.storage import open_storage
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.registry.bundle_store import local_bundle, upload_bundle
from fluid_core.registry.models import resolve_model
from fluid_core.registry.promotion import promote
from fluid_core.serving.errors import ApiError
from fluid_core.serving.files import FileStore


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
