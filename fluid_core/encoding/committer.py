"""Assembles a shard from its chunks and commits it: write, re-open and validate, publish, and the ledger record last.

Nothing is ever overwritten: data files are published only where there are none, and a file that another encoder published
first is validated and adopted, so that the record always describes the bytes that are there.
"""

import errno
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fluid_core.data.filters import count_reasons
from fluid_core.data.storage import Storage, TransientError, open_storage
from fluid_core.encoding.chunks import Dropped, EncodedChunk
from fluid_core.encoding.ledger import Ledger, ShardRecord
from fluid_core.encoding.read_decode import freeze_imports
from fluid_core.encoding.scratch import no_space, scratch_folder
from fluid_core.encoding.settings import EncodeSettings
from fluid_core.encoding.statistics import Histograms, LatentStatistics
from fluid_core.latents.writer import RowGroupWriter, file_sha256, latents_writer, text_writer, write_quarantine

logger = logging.getLogger(__name__)

Failure = dict[str, str]


@dataclass
class _Rows:
    """Rows of one latent size that wait for their row group to fill."""

    latents: dict[str, list[Any]] = field(default_factory=dict)
    text: list[list[bytes]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.latents.get("key", []))


class ShardFiles:
    """One shard being written into the scratch folder."""

    def __init__(self, chunk: EncodedChunk, settings: EncodeSettings, folder: Path):
        self.settings = settings
        self.id = chunk.shard["id"]
        self.folder = folder
        facts = {"kind": settings.kind, "settings": settings.hash, "latent_shape": str(settings.latent_shape)}
        self.latents: RowGroupWriter = latents_writer(folder / "latents.parquet", settings.kind, settings.flip, facts)
        self.text: RowGroupWriter | None = None
        if settings.text_mode == "embeddings":
            width = str(settings.encoders.text["width"])
            facts = {"dtype": settings.text_dtype, "settings": settings.hash, "width": width}
            self.text = text_writer(folder / "text.parquet", facts)
        self.next_sequence = 0
        self.waiting: dict[int, EncodedChunk] = {}
        self.pending: dict[tuple[int, int], _Rows] = {}
        self.shapes: list[list[int]] = []
        self.kept: list[tuple[str, str]] = []
        self.dropped: list[Dropped] = []
        self.statistics = LatentStatistics.empty(settings.encoders.latent_channels)
        self.histograms = Histograms()
        self.captions_cut = 0
        self.cosines: list[float] = []

    def add(self, chunk: EncodedChunk) -> None:
        names = ("moments", "moments_flip") if self.settings.kind == "kl" else ("codes", "codes_flip")
        stride = self.settings.encoders.stride
        item = 2 if self.settings.token_dtype == "uint16" else 4
        for i, sample in enumerate(chunk.samples):
            size = (sample.size[0] // stride, sample.size[1] // stride)
            rows = self.pending.setdefault(size, _Rows())
            values = {name: getattr(sample, name) for name in ("key", "sha256", "captions", "width", "height", "metadata")}
            values |= {
                "crop": list(sample.crop),
                "latent_size": list(size),
                "token_ids": chunk.token_ids[i],
                names[0]: chunk.latents[i],
            }
            if chunk.latents_flip is not None:
                values[names[1]] = chunk.latents_flip[i]
            for name, value in values.items():
                rows.latents.setdefault(name, []).append(value)
            if chunk.text is not None:
                rows.text.append(chunk.text[i])
            self.kept.append((sample.key, sample.sha256))
            self.histograms.count(sample.width, sample.height, [len(ids) // item for ids in chunk.token_ids[i]])
            if len(rows) == self.settings.rows_per_group:
                self._flush(size)
        self.dropped.extend(chunk.dropped)
        self.captions_cut += chunk.captions_cut
        self.cosines.extend(chunk.cosines)
        if self.settings.kind == "kl":
            self._measure(chunk)

    def _measure(self, chunk: EncodedChunk) -> None:
        by_length: dict[int, list[bytes]] = {}
        for value in chunk.latents:
            by_length.setdefault(len(value), []).append(value)
        for _, values in sorted(by_length.items()):
            part = LatentStatistics.of_bytes(values, self.settings.encoders.latent_channels)
            self.statistics = self.statistics.merge(part)

    def _flush(self, size: tuple[int, int]) -> None:
        rows = self.pending.pop(size)
        self.latents.write_group(rows.latents)
        if self.text is not None:
            self.text.write_group({"key": rows.latents["key"], "embeddings": rows.text})
        self.shapes.append(list(size))

    def finish(self) -> ShardRecord:
        """Close the files, re-open and check them, and draw up the record."""
        quarantined = sum(d.status == "quarantined" for d in self.dropped)
        samples_in = len(self.kept) + len(self.dropped)
        set_aside = quarantined > self.settings.max_bad_ratio * samples_in
        if set_aside:
            detail = f"{quarantined} of {samples_in} samples of this shard are bad, over encode.max_bad_ratio"
            self.dropped.extend(Dropped(key, "quarantined", "shard_set_aside", detail, sha) for key, sha in self.kept)
            self.kept, self.pending = [], {}
            self.statistics = LatentStatistics.empty(self.settings.encoders.latent_channels)
        for size in sorted(self.pending):
            self._flush(size)
        self.latents.close()
        if self.text is not None:
            self.text.close()
        write_quarantine(self.folder / "quarantine.parquet", [vars(d) for d in self.dropped])
        rows = len(self.kept)
        record = ShardRecord(
            id=self.id,
            settings_hash=self.settings.hash,
            rows=rows,
            row_groups=self.latents.row_groups if rows else [],
            shapes=self.shapes if self.settings.buckets and rows else None,
            bytes=0,
            sha256="",
            quarantine_rows=len(self.dropped),
            set_aside=set_aside,
            samples_in=samples_in,
            filtered=count_reasons(d.reason for d in self.dropped if d.status == "filtered"),
            quarantined=count_reasons(d.reason for d in self.dropped if d.status == "quarantined"),
        )
        if rows:
            record.statistics = self.statistics.as_json() if self.settings.kind == "kl" else None
            record.histograms = self.histograms.as_json()
            record.captions, record.captions_cut = self.histograms.total_captions, self.captions_cut
            if self.cosines:
                total = {"tokens": len(self.cosines), "sum": sum(self.cosines), "min": min(self.cosines)}
                record.text_cosine = {name: float(value) for name, value in total.items()}
            validate(self.folder / "latents.parquet", record, self.kept[0][0] if not self.settings.buckets else None)
            if self.text is not None:
                validate(self.folder / "text.parquet", record, None)
        record.check()
        return record


def validate(path: Path, record: ShardRecord, first_key: str | None) -> None:
    """Re-open a finished file: whole footer, the record's row groups, the first key, and the first and last group decode."""
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert groups == record.row_groups, f"{path}: row groups {groups}, expected {record.row_groups}"
    for group in {0, len(groups) - 1}:
        table = file.read_row_group(group)
        assert group or first_key is None or table["key"][0].as_py() == first_key, f"{path}: first key {table['key'][0]}"


class Committer:
    """A Ray actor: chunks of many shards come in any order, each shard is committed when its last piece is there."""

    def __init__(self, settings: EncodeSettings):
        self.settings = settings
        self.open: dict[tuple[str, str], ShardFiles] = {}
        self.closed: dict[tuple[str, str], Failure | None] = {}
        self.taken = 0
        freeze_imports()

    def add(self, chunk: EncodedChunk) -> Failure | None:
        """Take a chunk (again, harmlessly); returns what is wrong with its shard, if anything is."""
        self.taken += 1
        where = (chunk.output, chunk.shard["id"])
        if where in self.closed:
            return self.closed[where]
        storage = open_storage(chunk.output)
        try:
            if where not in self.open:
                folder = scratch_folder("fluid-shard-", self.settings.scratch or storage.scratch())
                self.open[where] = ShardFiles(chunk, self.settings, folder)
            files = self.open[where]
            if chunk.sequence >= files.next_sequence:
                files.waiting[chunk.sequence] = chunk
            while files.next_sequence in files.waiting:
                ready = files.waiting.pop(files.next_sequence)
                files.next_sequence += 1
                files.add(ready)
                if ready.last:
                    publish(storage, files.folder, files.finish(), self.settings)
                    self._close(where, None)
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and Ledger(storage).read(chunk.shard["id"]) is not None:
                # Another encoder committed everything, finished, and removed the scratch folder that we write in.
                self._close(where, None)
            elif isinstance(error, TransientError):
                self._close(where, {"kind": "passing", "message": str(error)})
            elif isinstance(error, (PermissionError, ValueError)):
                self._close(where, {"kind": "fatal", "message": str(error)})
            elif error.errno == errno.ENOSPC:
                self._close(where, {"kind": "fatal", "message": no_space(files.folder if where in self.open else chunk.output)})
            else:
                raise
        return self.closed.get(where)

    def _close(self, where: tuple[str, str], failure: Failure | None) -> None:
        files = self.open.pop(where, None)
        if files is not None:
            for writer in (files.latents, files.text):
                if writer is not None:
                    writer.abandon()
            shutil.rmtree(files.folder, ignore_errors=True)
        self.closed[where] = failure

    def state(self) -> tuple[int, dict[str, Failure]]:
        """(chunks taken since the actor started, what is wrong with shards by id)."""
        return self.taken, {shard: failure for (_, shard), failure in self.closed.items() if failure is not None}

    def discard(self) -> None:
        """Remove the scratch files of shards that did not come to their end."""
        for where in list(self.open):
            self._close(where, None)


def publish(storage: Storage, folder: Path, record: ShardRecord, settings: EncodeSettings) -> bool:
    """Put the files where there are none, then the record. Returns False when another encoder's record was first."""
    files = {"quarantine": folder / "quarantine.parquet"} if record.quarantine_rows else {}
    if record.rows:
        if settings.text_mode == "embeddings":
            files["text"] = folder / "text.parquet"
        files["latents"] = folder / "latents.parquet"
    ledger = Ledger(storage)
    for kind, path in files.items():
        name = f"{kind}/{record.id}.parquet"
        if not storage.put_file(path, name, overwrite=False):
            path = _adopt(storage, name, path, record, kind)
        if kind == "latents":
            record.bytes, record.sha256 = path.stat().st_size, file_sha256(path)
        elif kind == "text":
            record.text_bytes, record.text_sha256 = path.stat().st_size, file_sha256(path)
    return ledger.commit(record)


def _adopt(storage: Storage, name: str, own: Path, record: ShardRecord, kind: str) -> Path:
    """The file under `name`, of a killed run or a racing encoder, if whole and of the same rows; else ours replaces it."""
    theirs = storage.fetch(name, own.parent / "theirs")
    if file_sha256(theirs) == file_sha256(own):
        return own
    try:
        file, mine = pq.ParquetFile(theirs), pq.ParquetFile(own)
        same = file.schema_arrow.equals(mine.schema_arrow, check_metadata=True)
        same = same and file.read(columns=["key"]).equals(mine.read(columns=["key"]))
        if kind != "quarantine":
            validate(theirs, record, None)
    except (AssertionError, OSError, ValueError) as error:
        logger.warning("%s is replaced: %s", name, error)
        same = False
    if same:
        return theirs
    storage.put_file(own, name, overwrite=True)
    return own
