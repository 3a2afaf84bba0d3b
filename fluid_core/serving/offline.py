"""Offline generation as a Ray Data job: chunks of lines go to actors that hold a FluidPipeline and commit what they made.

The ledger (ledger.py) is the job's memory. A chunk's images are put under names that follow from its lines, then its results,
then its ledger entry: a job that was killed anywhere makes what is missing again, under the same names, and nothing twice.
"""

import hashlib
import json
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fluid_core.config import Recipe
from fluid_core.data.storage import Storage, open_storage
from fluid_core.registry.models import ModelRef, resolve_model
from fluid_core.serving.batch_rows import LineError, parse_body, parse_envelope
from fluid_core.serving.errors import ApiError, bad_request
from fluid_core.serving.generator import settings_of
from fluid_core.serving.ledger import JobLedger, JobPlan, json_line, plan_lines, read_chunk
from fluid_core.serving.provenance import png_bytes
from fluid_core.serving.requests import ServedModel
from fluid_core.serving.safety import load_safety_hook
from fluid_core.serving.schema import GenerationBody
from fluid_core.serving.tasks import ImageTask

if TYPE_CHECKING:
    from fluid_core.generation.engine import GenerationRequest
    from fluid_core.generation.pipeline import FluidPipeline

WRITERS = 8
"""Images compressed and stored at a time, while the next ones are made."""


class OfflineJob:
    """Plan, run, and collect. Making one checks everything that can be wrong before work starts."""

    def __init__(self, recipe: Recipe, prompts: str, output: str, chunk_rows: int | None = None, force: bool = False):
        """Raises ValueError: no prompts file, an empty one, no model, or a folder that holds another job."""
        from fluid_core.serving.app import absolute_paths

        self.recipe = absolute_paths(recipe)
        self.prompts, self.output = _absolute(prompts), _absolute(output)
        self.storage = open_storage(self.output)
        self.ref = resolve_model(recipe.serving.model, self.recipe.registry)
        load_safety_hook(recipe.serving.safety_hook, recipe.serving.blocked_words_file)
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"--chunk {chunk_rows}: at least 1 line is committed together")
        # A version that is registered stays what it is; a folder is known by its manifest.
        settings = {"model": self.ref.label, "bundle": _bundle_key(self.ref)}
        with tempfile.TemporaryDirectory(prefix="fluid-prompts-") as scratch:
            with open(fetch_prompts(self.prompts, Path(scratch)), "rb") as file:
                self._new = plan_lines(file, chunk_rows or 4 * recipe.serving.max_batch_size, settings)
        # Only now, a mistyped name must not cost what is there; and only what a job made, images/ may be somebody's.
        if force and self.storage.size_or_none("plan.json") is not None:
            for folder in ("_ledger/", "output/", "errors/", "images/"):
                for entry in list(self.storage.list(folder)):
                    self.storage.delete(entry.name)
            for name in ("plan.json", "output.jsonl", "errors.jsonl", "summary.json"):
                self.storage.delete(name)

    def plan(self) -> JobPlan:
        """The job's plan: the one in the output folder, or a new one.

        Raises:
            ValueError: the folder holds the job of other prompts or of another model.
        """
        new = self._new
        plan = JobLedger(self.storage).write_plan(new)
        for name, here, there in (
            ("prompts", new.input_sha256, plan.input_sha256),
            ("model", new.settings["bundle"], plan.settings["bundle"]),
        ):
            if here != there:
                raise ValueError(
                    f"{self.output} holds a job with another {name}: give a new --output, or --force to start over"
                )
        return plan

    def run(self) -> dict[str, Any]:
        """Generate what is missing. Returns the summary that is also written to summary.json. Needs a Ray session."""
        import ray

        started = time.monotonic()
        plan = self.plan()
        ledger = JobLedger(self.storage)
        done = ledger.committed()
        pending = [chunk for chunk in range(plan.chunks) if chunk not in done]
        finished = sum(record.rows for record in done.values())
        config = self.recipe.serving
        if pending:
            dataset = ray.data.from_items(
                [{"chunk": chunk} for chunk in pending], override_num_blocks=len(pending)
            ).map_batches(
                ChunkActor,
                fn_constructor_args=(
                    self.recipe.model_dump(mode="json"),
                    self.ref,
                    self.prompts,
                    self.output,
                    plan.model_dump(),
                ),
                batch_size=1,
                concurrency=min(config.replicas, len(pending)),
                num_cpus=config.cpus_per_replica,
                num_gpus=config.gpus_per_replica,
            )
            with tqdm(total=plan.rows, initial=finished, desc="generate_batch", unit="line") as bar:
                for row in dataset.iter_rows():
                    bar.update(int(row["rows"]))
        return self._collect(plan, ledger, time.monotonic() - started)

    def _collect(self, plan: JobPlan, ledger: JobLedger, seconds: float) -> dict[str, Any]:
        records = ledger.committed()
        assert len(records) == plan.chunks, "every chunk was generated"
        with tempfile.TemporaryDirectory(prefix="fluid-collect-") as scratch:
            for kind, name in (("output", "output.jsonl"), ("errors", "errors.jsonl")):
                path = Path(scratch) / name
                with open(path, "wb") as file:
                    for part in ledger.results(kind, records.values()):
                        file.write(part)
                self.storage.put_file(path, name, overwrite=True)
        work = sum(record.seconds for record in records.values())
        hourly = self.recipe.serving.cost_per_replica_hour
        summary = {
            "rows": plan.rows,
            "images": sum(record.completed for record in records.values()),
            "failed": sum(record.failed for record in records.values()),
            "model": self.ref.label,
            "seconds": round(seconds, 2),
            "replica_seconds": round(work, 2),
            "cost": None if hourly is None else round(work / 3600 * hourly, 6),
        }
        self.storage.put_bytes(json.dumps(summary, indent=2).encode() + b"\n", "summary.json", overwrite=True)
        return summary


class ChunkActor:
    """Holds the model on one worker; a call makes and commits one chunk."""

    def __init__(self, recipe: dict[str, Any], ref: ModelRef, prompts: str, output: str, plan: dict[str, Any]):
        self._recipe = Recipe.model_validate(recipe)
        self._served = ServedModel(ref, self._recipe)
        config = self._recipe.serving
        self._safety = load_safety_hook(config.safety_hook, config.blocked_words_file)
        self._plan = JobPlan.model_validate(plan)
        self._storage = open_storage(output)
        self._ledger = JobLedger(self._storage)
        self._scratch = tempfile.TemporaryDirectory(prefix="fluid-prompts-")
        self._prompts = fetch_prompts(prompts, Path(self._scratch.name))

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        chunk = int(batch["chunk"][0])
        started = time.monotonic()
        lines = read_chunk(self._prompts, self._plan, chunk)
        first = chunk * self._plan.chunk_rows
        good, bad = make_chunk(
            self._served, self._safety, self._recipe, self._storage, chunk, first, lines, self._plan.input_sha256
        )
        self._ledger.commit(
            chunk,
            b"".join(json_line(row) for row in good),
            b"".join(json_line(row) for row in bad),
            len(good),
            len(bad),
            time.monotonic() - started,
            self._served.ref.label,
        )
        return {"rows": np.array([len(lines)])}


def make_chunk(
    served: ServedModel, safety: Any, recipe: Recipe, storage: Storage, chunk: int, first: int, lines: list[bytes], job: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows that have an image, rows that have an error), each in the order of the lines. Images are stored here."""
    good: dict[int, dict[str, Any]] = {}
    bad: dict[int, dict[str, Any]] = {}
    groups: dict[tuple[Any, ...], list[tuple[int, str, ImageTask, Any]]] = defaultdict(list)
    for offset, line in enumerate(lines):
        index = first + offset
        custom_id = str(index + 1)
        try:
            custom_id, body = parse_envelope(line, index + 1, plain=True)
            task = task_of(parse_body(body, job, index), recipe, served, safety)
            request = served.requests(task)[0]
            groups[(request.grid, request.head_steps, request.solver)].append((index, custom_id, task, request))
        except (LineError, ApiError, ValueError) as error:
            code = getattr(error, "code", "invalid_value")
            message = error.message if isinstance(error, ApiError) else str(error)
            bad[index] = {"custom_id": custom_id, "line": index + 1, "error": {"code": code, "message": message}}
    size = recipe.serving.max_batch_size
    with ThreadPoolExecutor(WRITERS) as pool:
        stored = []
        for items in groups.values():
            for start in range(0, len(items), size):
                part = items[start : start + size]
                images = _images(served.pipeline, [request for *_, request in part])
                for (index, custom_id, task, request), image in zip(part, images, strict=True):
                    if isinstance(image, FloatingPointError):
                        reason = {"code": "generation_failed", "message": str(image)}
                        bad[index] = {"custom_id": custom_id, "line": index + 1, "error": reason}
                        continue
                    refusal = safety.check_image(image, task.prompt, task.user)
                    if refusal is not None:
                        reason = {"code": "content_policy_violation", "message": refusal}
                        bad[index] = {"custom_id": custom_id, "line": index + 1, "error": reason}
                        continue
                    name = f"images/{chunk:06d}/{index + 1:09d}.png"
                    row = {"custom_id": custom_id, "line": index + 1, "image": name, "seed": task.seed, "prompt": task.prompt}
                    good[index] = row | {"model": served.ref.label}
                    details = served.provenance(task, 0, settings_of(request))
                    stored.append((index, pool.submit(_store, storage, name, image, details)))
        for index, digest in stored:
            good[index]["sha256"] = digest.result()
    return [good[index] for index in sorted(good)], [bad[index] for index in sorted(bad)]


def _store(storage: Storage, name: str, image: Image.Image, details: dict[str, Any]) -> str:
    """Put an image as PNG; the sha256 of its bytes."""
    data = png_bytes(image, details)
    storage.put_bytes(data, name, overwrite=True)
    return hashlib.sha256(data).hexdigest()


def _images(pipeline: "FluidPipeline", requests: list["GenerationRequest"]) -> list[Image.Image | FloatingPointError]:
    """One batch; in place of an image that came out NaN its error."""
    try:
        return list(pipeline.run(requests, batch_size=len(requests)))
    except FloatingPointError as error:
        return [error] if len(requests) == 1 else [_images(pipeline, [request])[0] for request in requests]


def task_of(body: GenerationBody, recipe: Recipe, served: ServedModel, safety: Any) -> ImageTask:
    """A line's request as a task. Raises ApiError 400 for what a line cannot ask, or for a refused prompt."""
    if (body.n or 1) != 1:
        raise bad_request("n: a line makes one image; write one line an image", "n")
    if body.model is not None and body.model not in served.names:
        raise bad_request(f"model: this job runs {served.ref.label}", "model")
    if body.deadline is not None:
        raise bad_request("deadline: an offline job has none", "deadline")
    refusal = safety.check_prompt(body.prompt, body.user)
    if refusal is not None:
        raise ApiError(400, "content_policy_violation", refusal, "prompt")
    size = None
    if body.size not in (None, "auto"):
        width, height = (int(side) for side in str(body.size).split("x"))
        if max(width, height) > recipe.serving.max_image_side:
            raise bad_request(f"size: at most {recipe.serving.max_image_side} pixels a side (serving.max_image_side)", "size")
        size = (width, height)
    assert body.seed is not None
    return ImageTask(
        prompt=body.prompt,
        count=1,
        seed=body.seed,
        size=size,
        steps=body.steps,
        guidance=body.guidance,
        temperature=body.temperature,
        negative_prompt=body.negative_prompt,
        user=body.user,
    )


def fetch_prompts(prompts: str, folder: Path) -> Path:
    """A local path of the prompts file. Raises ValueError when there is none."""
    parent, _, name = prompts.rpartition("/")
    storage = open_storage(parent or ".")
    if storage.size_or_none(name) is None:
        raise ValueError(f"--prompts {prompts} does not exist")
    return storage.fetch(name, folder)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


def _bundle_key(ref: ModelRef) -> str:
    from fluid_core.registry.bundle import bundle_digest

    return ref.tags.get("fluid.bundle_sha256") or bundle_digest(ref.path)
