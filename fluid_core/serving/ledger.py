"""The record of a batch job: a plan, and one committed result for each chunk of its lines. Local or on S3.

    <root>/plan.json                     input (size, sha256), where each chunk of lines begins, the settings' hash
    <root>/output/000012-<digest>.jsonl  the chunk's answers, one line an image request
    <root>/errors/000012-<digest>.jsonl  the chunk's refusals and failures
    <root>/_ledger/000012.json           written last, and only if absent: the chunk counts from then on, once

Any process may be killed at any time: what has no ledger entry is made again. Two processes may make the same chunk (one takes a
batch over while the other still commits) with answers that differ in their times: each writes files of its own, named by their
content, and the ledger entry, with the digests, says whose count.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from fluid_core.data.storage import Storage

READERS = 16
"""Objects read at a time: a job of a million lines has thousands, and S3 takes some 20 ms for each."""


class ChunkRecord(BaseModel):
    """A committed chunk. The model version is the one that made it: an alias may move during a long job."""

    chunk: int
    rows: int
    completed: int
    failed: int
    output_sha256: str
    errors_sha256: str
    seconds: float
    model: str

    def sha256_of(self, kind: str) -> str:
        """Of the chunk's `output` or `errors`."""
        return self.output_sha256 if kind == "output" else self.errors_sha256


class JobPlan(BaseModel):
    """Which lines belong to which chunk. `offsets` has one byte offset a chunk and the file's size at the end."""

    schema_version: int = 1
    input_bytes: int
    input_sha256: str
    rows: int
    chunk_rows: int
    offsets: list[int]
    settings: dict[str, Any]

    @property
    def chunks(self) -> int:
        return len(self.offsets) - 1

    def rows_of(self, chunk: int) -> int:
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows)


class JobLedger:
    """Plan and results under one folder of a storage."""

    def __init__(self, storage: Storage, root: str = ""):
        self._storage = storage
        self._root = f"{root.strip('/')}/" if root else ""

    def plan(self) -> JobPlan | None:
        data = self._storage.read_or_none(f"{self._root}plan.json")
        return None if data is None else JobPlan.model_validate_json(data)

    def write_plan(self, plan: JobPlan) -> JobPlan:
        """The plan in force: this one, or the one that another process wrote first."""
        name = f"{self._root}plan.json"
        self._storage.put_bytes(plan.model_dump_json().encode(), name, overwrite=False)
        found = self.plan()
        assert found is not None
        return found

    def committed(self) -> dict[int, ChunkRecord]:
        names = [entry.name for entry in self._storage.list(f"{self._root}_ledger/")]
        with ThreadPoolExecutor(READERS) as pool:
            found = [data for data in pool.map(self._storage.read_or_none, names) if data is not None]
        records = [ChunkRecord.model_validate_json(data) for data in found]
        return {record.chunk: record for record in records}

    def commit(self, chunk: int, output: bytes, errors: bytes, completed: int, failed: int, seconds: float, model: str) -> bool:
        """Store a chunk's results, then its ledger entry. False: another process had committed it, its results stand."""
        entry = f"{self._root}_ledger/{chunk:06d}.json"
        if self._storage.size_or_none(entry) is not None:
            return False
        record = ChunkRecord(
            chunk=chunk,
            rows=completed + failed,
            completed=completed,
            failed=failed,
            output_sha256=hashlib.sha256(output).hexdigest(),
            errors_sha256=hashlib.sha256(errors).hexdigest(),
            seconds=seconds,
            model=model,
        )
        self._storage.put_bytes(output, self._name("output", record), overwrite=True)
        self._storage.put_bytes(errors, self._name("errors", record), overwrite=True)
        return self._storage.put_bytes(record.model_dump_json().encode(), entry, overwrite=False)

    def results(self, kind: str, chunks: Iterable[ChunkRecord]) -> Iterator[bytes]:
        """The committed chunks' `output` or `errors`, in the order of the input.

        Raises:
            ValueError: a file is missing or is not what its ledger entry says.
        """
        ordered = sorted(chunks, key=lambda record: record.chunk)
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(0, len(ordered), READERS):  # no more than these are in memory
                yield from pool.map(lambda record: self._result(kind, record), ordered[first : first + READERS])

    def _result(self, kind: str, record: ChunkRecord) -> bytes:
        name = self._name(kind, record)
        data = self._storage.read_or_none(name)
        if data is None or hashlib.sha256(data).hexdigest() != record.sha256_of(kind):
            entry = f"{self._root}_ledger/{record.chunk:06d}.json"
            raise ValueError(f"{name} is missing or damaged: delete {entry} and run the job again")
        return data

    def _name(self, kind: str, record: ChunkRecord) -> str:
        return f"{self._root}{kind}/{record.chunk:06d}-{record.sha256_of(kind)[:16]}.jsonl"


def plan_lines(file: IO[bytes], chunk_rows: int, settings: dict[str, Any]) -> JobPlan:
    """Read a JSONL file once: its digest, its number of lines (blank ones are no rows), and where each chunk begins."""
    digest = hashlib.sha256()
    offsets, rows, position = [0], 0, 0
    for line in file:
        digest.update(line)
        if line.strip():
            if rows and rows % chunk_rows == 0:
                offsets.append(position)
            rows += 1
        position += len(line)
    if rows == 0:
        raise ValueError("the input has no lines")
    return JobPlan(
        input_bytes=position,
        input_sha256=digest.hexdigest(),
        rows=rows,
        chunk_rows=chunk_rows,
        offsets=[*offsets, position],
        settings=settings,
    )


def read_chunk(source: Path, plan: JobPlan, chunk: int) -> list[bytes]:
    """The lines of one chunk."""
    with open(source, "rb") as file:
        file.seek(plan.offsets[chunk])
        data = file.read(plan.offsets[chunk + 1] - plan.offsets[chunk])
    return [line for line in data.split(b"\n") if line.strip()]


def json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode() + b"\n"
