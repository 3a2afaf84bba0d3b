"""`/v1/batches`: JSONL in, JSONL out, at the replicas' leisure.

A batch runs inside the gateway: its images go to the same replicas as everyone's, behind them in the queue. Its state is in
the storage (ledger.py), so that a gateway that starts again goes on with what was running. In a redeploy the new gateway starts
while the old one still finishes its requests: the one that took a batch last works on it, the other leaves off.
"""

import asyncio
import logging
import re
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Set
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from fluid_core.config import ServingConfig
from fluid_core.data.storage import Storage
from fluid_core.serving.batch_rows import LineError, parse_body, parse_envelope
from fluid_core.serving.errors import ApiError
from fluid_core.serving.files import FileStore
from fluid_core.serving.ledger import ChunkRecord, JobLedger, JobPlan, json_line, plan_lines, read_chunk
from fluid_core.serving.metrics import ServingMetrics
from fluid_core.serving.schema import (
    BatchBody,
    BatchError,
    BatchErrors,
    BatchObject,
    CostEstimate,
    GenerationBody,
    RequestCounts,
)

logger = logging.getLogger(__name__)

_ID = re.compile(r"batch_[a-f0-9]{32}$")
_TERMINAL = {"completed", "failed", "cancelled"}
_MAX_LISTED_ERRORS = 100
_ATTEMPTS = 4
PAUSE_SECONDS = 30.0
"""Before a batch goes on after a failure of the storage or of the replicas."""

Generate = Callable[[GenerationBody], Awaitable[dict[str, Any]]]


class _StoredBatch(BatchObject):
    owner: str
    runner: str = ""  # the gateway at work on it


class _TakenOver(Exception):
    """Another gateway goes on with the batch."""


class BatchRunner:
    """Creates, runs, resumes and cancels batches. `generate` makes the response body of one line, or raises ApiError."""

    def __init__(self, storage: Storage, files: FileStore, config: ServingConfig, metrics: ServingMetrics, generate: Generate):
        self._storage, self._files, self._config, self._metrics = storage, files, config, metrics
        self._generate = generate
        self._id = secrets.token_hex(8)
        # Lines at work at once: enough to keep every replica's batch full while others finish.
        places = config.replicas * config.max_batch_size
        self._places = asyncio.Semaphore(places + places // 2 + 1)
        self._chunk_rows = max(16, places)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._live: dict[str, RequestCounts] = {}
        self._stopped = False

    async def create(self, body: BatchBody, owner: str) -> BatchObject:
        """Raises ApiError 404 when the input file is not the caller's."""
        await asyncio.to_thread(self._files.get, body.input_file_id, owner)
        batch = _StoredBatch(
            id=f"batch_{secrets.token_hex(16)}",
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            status="validating",
            created_at=int(time.time()),
            metadata=body.metadata,
            owner=owner,
        )
        await self._save(batch)
        self._spawn(batch)
        return _public(batch)

    async def get(self, batch_id: str, owner: str) -> BatchObject:
        """Raises ApiError 404."""
        return _public(await self._load(batch_id, owner))

    async def of_owner(self, owner: str) -> list[BatchObject]:
        batches = [batch for batch in await asyncio.to_thread(self._all) if batch.owner == owner]
        return [_public(batch) for batch in sorted(batches, key=lambda batch: (-batch.created_at, batch.id))]

    async def cancel(self, batch_id: str, owner: str) -> BatchObject:
        """Stop a running batch; what was committed stays and is put into its output file. Raises ApiError 404, 400."""
        await self._load(batch_id, owner)
        running = self._tasks.get(batch_id)
        if running is not None:
            running.cancel()
            await asyncio.wait([running])
        batch = await self._load(batch_id, owner)
        if batch.status in _TERMINAL:
            raise ApiError(400, "invalid_state", f"the batch is {batch.status} already", "batch_id")
        batch.status, batch.cancelling_at = "cancelling", batch.cancelling_at or int(time.time())
        await self._save(batch)
        self._spawn(batch)
        return _public(batch)

    async def resume_all(self) -> None:
        """Go on with every batch that an earlier gateway left unfinished; and from then on with those that one leaves later.

        In a redeploy the old gateway takes requests until the new one is ready: what was created there meanwhile is free once it
        stops. The first look takes what a killed gateway had, the others only what nobody claims.
        """
        first, ended = True, set[str]()
        while not self._stopped:
            try:
                for batch in await asyncio.to_thread(self._all, ended):
                    if batch.status in _TERMINAL:
                        ended.add(batch.id)
                    elif batch.id not in self._tasks and (first or not batch.runner):
                        self._spawn(batch)
                first = False
            except Exception:
                logger.exception("the batches could not be listed; again in %g s", PAUSE_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)

    async def stop(self) -> None:
        """Leave off at once and for good; the ledger keeps what is done, and another gateway may go on."""
        self._stopped = True
        running = dict(self._tasks)
        for task in running.values():
            task.cancel()
        if running:
            await asyncio.wait(list(running.values()))
        try:
            for batch in await asyncio.to_thread(self._all) if running else []:
                if batch.id in running and batch.runner == self._id and batch.status not in _TERMINAL:
                    batch.runner = ""
                    await self._save(batch)
        except Exception:
            logger.exception("the batches that were running could not be given up; a gateway that starts takes them")

    def _spawn(self, batch: _StoredBatch) -> None:
        if self._stopped:  # nobody has claimed the batch: the next gateway takes it
            return
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch.id] = task

        def forget(finished: asyncio.Task[None]) -> None:
            if self._tasks.get(batch.id) is finished:
                del self._tasks[batch.id]
                self._live.pop(batch.id, None)

        task.add_done_callback(forget)

    async def _run(self, batch: _StoredBatch) -> None:
        """Take the batch and work on it to its end. A storage or replicas that are away are waited out; any other error would
        come again with every attempt, and ends the batch as failed."""
        taken, reason = False, None
        while True:
            try:
                if taken:
                    await self._check_mine(batch)
                else:
                    batch.runner = self._id
                    await self._save(batch)
                    taken = True
                if reason is not None:
                    batch.errors = BatchErrors(data=[BatchError(code="internal_error", message=reason)])
                    await self._end(batch, "failed")
                    return
                with tempfile.TemporaryDirectory(prefix="fluid-batch-") as scratch:
                    await self._work(batch, Path(scratch))
                return
            except _TakenOver:
                logger.info("batch %s: another gateway goes on with it", batch.id)
                return
            except Exception as error:
                if reason is None and not _passes(error):
                    logger.exception("batch %s fails", batch.id)
                    reason = f"the server failed on this batch: {error!r}"[:500]
                else:
                    logger.exception("batch %s stopped; it goes on in %g s", batch.id, PAUSE_SECONDS)
                    await asyncio.sleep(PAUSE_SECONDS)

    async def _work(self, batch: _StoredBatch, scratch: Path) -> None:
        """From wherever the batch is to its end. Raises _TakenOver, or what the storage raises."""
        ledger = JobLedger(self._storage, f"batches/{batch.id}")
        try:
            source = await asyncio.to_thread(self._files.fetch, batch.input_file_id, batch.owner, scratch)
        except ApiError as error:  # the client deleted its file
            batch.errors = BatchErrors(data=[BatchError(code=error.code, message=error.message)])
            await self._end(batch, "failed")
            return
        plan = await asyncio.to_thread(ledger.plan)
        if plan is None:
            if batch.status == "cancelling":
                await self._end(batch, "cancelled")
                return
            plan = await self._validate(batch, ledger, source)
            if plan is None:
                return
        done = await asyncio.to_thread(ledger.committed)
        self._live[batch.id] = _counts(plan, done)
        if batch.status in ("validating", "in_progress"):
            batch.status, batch.in_progress_at = "in_progress", batch.in_progress_at or int(time.time())
            await self._save(batch)
            await self._generate_all(batch, ledger, plan, source, done)
        await self._finalise(batch, ledger, plan, scratch)

    async def _validate(self, batch: _StoredBatch, ledger: JobLedger, source: Path) -> JobPlan | None:
        def work() -> tuple[JobPlan | None, list[BatchError]]:
            problems: list[BatchError] = []
            seen: set[str] = set()
            with open(source, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip() or len(problems) >= _MAX_LISTED_ERRORS:
                        continue
                    try:
                        custom_id, _ = parse_envelope(line, number, plain=False)
                        if custom_id in seen:
                            raise LineError("duplicate_custom_id", f"custom_id {custom_id[:60]!r} is in an earlier line too")
                        seen.add(custom_id)
                    except LineError as error:
                        problems.append(BatchError(code=error.code, message=str(error), line=number))
                if problems:
                    return None, problems
                file.seek(0)
                try:
                    plan = plan_lines(file, self._chunk_rows, {"batch": batch.id})
                except ValueError as error:
                    return None, [BatchError(code="empty_file", message=str(error))]
            return ledger.write_plan(plan), []

        plan, problems = await asyncio.to_thread(work)
        if plan is None:
            batch.errors = BatchErrors(data=problems)
            await self._end(batch, "failed")
        return plan

    async def _generate_all(
        self, batch: _StoredBatch, ledger: JobLedger, plan: JobPlan, source: Path, done: dict[int, ChunkRecord]
    ) -> None:
        """Two chunks at a time: the next one fills the places that the first leaves free."""
        pending = iter([chunk for chunk in range(plan.chunks) if chunk not in done])

        async def worker() -> None:
            for chunk in pending:
                await self._check_mine(batch)
                await self._chunk(batch, ledger, plan, source, chunk)

        workers = [asyncio.create_task(worker()) for _ in range(2)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.wait(workers)

    async def _chunk(self, batch: _StoredBatch, ledger: JobLedger, plan: JobPlan, source: Path, chunk: int) -> None:
        started = time.monotonic()
        lines = await asyncio.to_thread(read_chunk, source, plan, chunk)
        rows = [self._row(batch, chunk * plan.chunk_rows + index, line) for index, line in enumerate(lines)]
        tasks = [asyncio.create_task(row) for row in rows]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        good = [json_line(result) for result in results if result["response"]["status_code"] == 200]
        bad = [json_line(result) for result in results if result["response"]["status_code"] != 200]
        model = next((r["response"]["body"]["model"] for r in results if r["response"]["status_code"] == 200), "")
        seconds = time.monotonic() - started
        # Once begun, a commit is finished: a cancellation in between would leave the counts in doubt.
        await asyncio.shield(
            asyncio.to_thread(ledger.commit, chunk, b"".join(good), b"".join(bad), len(good), len(bad), seconds, model)
        )

    async def _row(self, batch: _StoredBatch, index: int, line: bytes) -> dict[str, Any]:
        custom_id, raw = parse_envelope(line, index + 1, plain=False)
        request_id = f"{batch.id}-{index}"
        counts = self._live[batch.id]
        try:
            body = parse_body(raw, batch.id, index)
            async with self._places:
                status, answer = 200, await self._patiently(body)
            counts.completed += 1
        except ApiError as error:
            status, answer = error.status, error.body()
            counts.failed += 1
        self._metrics.batch_items.labels("completed" if status == 200 else "failed").inc()
        response = {"status_code": status, "request_id": request_id, "body": answer}
        return {"id": request_id, "custom_id": custom_id, "response": response, "error": None}

    async def _patiently(self, body: GenerationBody) -> dict[str, Any]:
        """What may pass (a lost replica, a server that is not ready yet) is tried again."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._generate(body)
            except ApiError as error:
                if error.retry_after is None or attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(error.retry_after * 2**attempt)
        raise AssertionError

    async def _finalise(self, batch: _StoredBatch, ledger: JobLedger, plan: JobPlan, scratch: Path) -> None:
        await self._check_mine(batch)
        if batch.status == "in_progress":
            batch.status, batch.finalizing_at = "finalizing", int(time.time())
            await self._save(batch)

        def work() -> RequestCounts:
            done = ledger.committed()
            counts = _counts(plan, done)
            for kind, rows in (("output", counts.completed), ("errors", counts.failed)):
                if not rows:
                    continue
                path = scratch / f"{kind}.jsonl"
                with open(path, "wb") as file:
                    for part in ledger.results(kind, done.values()):
                        file.write(part)
                # The id follows from the batch's, so that a finalisation that is repeated makes no second file.
                file_id = f"file-{kind}-{batch.id.removeprefix('batch_')}"
                self._files.create(path, f"{batch.id}_{kind}.jsonl", "batch_output", batch.owner, file_id)
                if kind == "output":
                    batch.output_file_id = file_id
                else:
                    batch.error_file_id = file_id
            return counts

        batch.request_counts = await asyncio.to_thread(work)
        await self._end(batch, "cancelled" if batch.status == "cancelling" else "completed")

    async def _end(self, batch: _StoredBatch, status: str) -> None:
        batch.status = status  # type: ignore[assignment]
        setattr(batch, f"{status}_at", int(time.time()))
        await self._save(batch)

    async def _check_mine(self, batch: _StoredBatch) -> None:
        """Raises _TakenOver."""
        data = await asyncio.to_thread(self._storage.read_or_none, f"batches/{batch.id}/batch.json")
        if data is None or _StoredBatch.model_validate_json(data).runner != self._id:
            raise _TakenOver

    async def _save(self, batch: _StoredBatch) -> None:
        name = f"batches/{batch.id}/batch.json"
        await asyncio.to_thread(self._storage.put_bytes, batch.model_dump_json().encode(), name, True)

    async def _load(self, batch_id: str, owner: str) -> _StoredBatch:
        data = None
        if _ID.match(batch_id):
            data = await asyncio.to_thread(self._storage.read_or_none, f"batches/{batch_id}/batch.json")
        batch = None if data is None else _StoredBatch.model_validate_json(data)
        if batch is None or batch.owner != owner:
            raise ApiError(404, "batch_not_found", "no batch of that id", "batch_id")
        live = self._live.get(batch_id)
        if live is not None and batch.status not in _TERMINAL:
            batch.request_counts = live.model_copy()
            batch.estimate = self._estimate(batch, live)
        return batch

    def _estimate(self, batch: _StoredBatch, counts: RequestCounts) -> CostEstimate:
        done = counts.completed + counts.failed
        if not done or batch.in_progress_at is None:
            return CostEstimate()
        each = max(time.time() - batch.in_progress_at, 0.001) / done
        hourly = self._config.cost_per_replica_hour
        cost = None if hourly is None else round(each * counts.total / 3600 * hourly * self._config.replicas, 6)
        return CostEstimate(
            seconds_per_image=round(each, 4), remaining_seconds=round(each * (counts.total - done), 1), cost=cost
        )

    def _all(self, without: Set[str] = frozenset()) -> list[_StoredBatch]:
        batches = []
        for entry in self._storage.list("batches/"):
            if entry.name.endswith("/batch.json") and entry.name.split("/")[-2] not in without:
                data = self._storage.read_or_none(entry.name)
                if data is not None:
                    batches.append(_StoredBatch.model_validate_json(data))
        return batches


def _counts(plan: JobPlan, done: dict[int, ChunkRecord]) -> RequestCounts:
    records = done.values()
    return RequestCounts(total=plan.rows, completed=sum(r.completed for r in records), failed=sum(r.failed for r in records))


def _passes(error: Exception) -> bool:
    """Whether waiting may help: the storage, the network or the replicas. An exception of a replica's code is no such thing."""
    if isinstance(error, RayTaskError):
        return False
    return isinstance(error, (OSError, RayError, RayServeException))


def _public(batch: _StoredBatch) -> BatchObject:
    return BatchObject(**batch.model_dump(exclude={"owner", "runner"}))
