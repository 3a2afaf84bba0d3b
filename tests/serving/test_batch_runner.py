"""Batches without a server: the runner on a local storage, with a `generate` that the test decides on."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fluid_core.config import ServingConfig
from fluid_core.data.storage import TransientError, open_storage
from fluid_core.serving.batches import BatchRunner
from fluid_core.serving.files import FileStore
from fluid_core.serving.metrics import ServingMetrics
from fluid_core.serving.schema import BatchBody, BatchObject, GenerationBody

Generate = Callable[[GenerationBody], Awaitable[dict[str, Any]]]


async def answer(body: GenerationBody) -> dict[str, Any]:
    return {"model": "unit:1", "data": [], "seed": body.seed}


class Batches:
    """Runners that share a storage, as gateways do, and the batches of one client."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.storage = open_storage(str(folder / "serving"))
        self.files = FileStore(self.storage)

    def runner(self, generate: Generate = answer) -> BatchRunner:
        return BatchRunner(self.storage, self.files, ServingConfig(max_batch_size=4), ServingMetrics(), generate)

    async def create(self, runner: BatchRunner, lines: list[bytes]) -> BatchObject:
        (self._folder / "in.jsonl").write_bytes(b"\n".join(lines))
        file = self.files.create(self._folder / "in.jsonl", "in.jsonl", "batch", "key:ann")
        body = BatchBody(input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h")
        return await runner.create(body, "key:ann")

    async def ended(self, runner: BatchRunner, batch: BatchObject) -> BatchObject:
        until = time.monotonic() + 20
        while batch.status not in ("completed", "failed", "cancelled"):
            assert time.monotonic() < until, f"the batch is still {batch.status}"
            await asyncio.sleep(0.01)
            batch = await runner.get(batch.id, "key:ann")
        return batch


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batches:
    monkeypatch.setattr("fluid_core.serving.batches.PAUSE_SECONDS", 0.05)
    return Batches(tmp_path)


def line(custom_id: str, **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"prompt": "a red circle"} | body}).encode()


@pytest.mark.parametrize("bad", [line("\ud800"), line("a", **{"\ud800": 1}), b"[" * 200_000], ids=["id", "field", "deep"])
def test_a_line_that_cannot_be_read_fails_the_file(batches: Batches, bad: bytes) -> None:
    async def run() -> None:
        runner = batches.runner()
        batch = await batches.ended(runner, await batches.create(runner, [line("good"), bad]))
        assert batch.status == "failed" and batch.errors is not None
        assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", 2)]

    asyncio.run(run())


def test_an_error_of_the_server_ends_the_batch_and_one_of_the_storage_does_not(batches: Batches) -> None:
    failures: list[Exception] = []

    async def fails_once(body: GenerationBody) -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return await answer(body)

    async def run() -> None:
        runner = batches.runner(fails_once)
        failures[:] = [TransientError("the store is away")]
        batch = await batches.ended(runner, await batches.create(runner, [line("a"), line("b")]))
        assert not failures and batch.status == "completed" and batch.request_counts.completed == 2

        failures[:] = [KeyError("size")]
        batch = await batches.ended(runner, await batches.create(runner, [line("a"), line("b")]))
        assert not failures and batch.status == "failed" and batch.failed_at and batch.errors is not None
        assert [(error.code, error.message) for error in batch.errors.data] == [
            ("internal_error", "the server failed on this batch: KeyError('size')")
        ]

    asyncio.run(run())


def test_a_gateway_that_drains_takes_no_batch_again(batches: Batches) -> None:
    """What it leaves, and what a client still creates there or cancels, is for the gateway that comes next."""

    async def never(body: GenerationBody) -> dict[str, Any]:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    started = asyncio.Event()

    async def run() -> None:
        old = batches.runner(never)
        watching = asyncio.create_task(old.resume_all())
        left = await batches.create(old, [line("a")])
        await started.wait()
        await old.stop()
        started.clear()
        late = await batches.create(old, [line("b")])
        await asyncio.wait_for(watching, 5)
        assert not started.is_set() and (await old.get(late.id, "key:ann")).status == "validating"

        new = batches.runner()
        resuming = asyncio.create_task(new.resume_all())
        for batch in (left, late):
            assert (await batches.ended(new, batch)).status == "completed"
        resuming.cancel()

    asyncio.run(run())
