"""Taking samples out of an encoded data set: affected shards are rewritten without them, then the ledger and the manifest.

Safe to interrupt and to run again. In each shard the quarantine file gets the keys first, then the text sidecar, the latents
and the ledger record are replaced; a shard whose files disagree with its record is finished from what its files hold.
Readers that were opened before refuse the changed files, because their manifest tells other sizes.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fluid_core.data.filters import OptOut
from fluid_core.data.storage import Storage
from fluid_core.encoding.ledger import Ledger, ShardRecord
from fluid_core.encoding.manifest import from_record, totals
from fluid_core.encoding.statistics import Histograms, LatentStatistics
from fluid_core.latents.manifest import Manifest
from fluid_core.latents.reader import EncodedDataset
from fluid_core.latents.writer import RowGroupWriter, file_sha256, write_quarantine

REASON = "forgotten"


@dataclass
class Forgotten:
    """What a run of `forget` did."""

    samples: int
    shards: int


def forget(root: str, entries: OptOut) -> Forgotten:
    """Remove the samples whose key, image sha256 or URL is listed.

    Raises:
        ValueError: no entries, or no complete data set under `root`.
    """
    if not entries.entries:
        raise ValueError("the list is empty: write keys, URLs or sha256, one a line")
    dataset = EncodedDataset(root)
    storage, ledger = dataset.storage, Ledger(dataset.storage)
    records: list[ShardRecord] = []
    done = Forgotten(0, 0)
    for shard in tqdm(dataset.manifest.shards, desc="forgetting", unit="shard", disable=None):
        record = ledger.read(shard.id)
        if record is None:
            raise ValueError(f"{root}: shard {shard.id} has no ledger record; run pipelines/encode_dataset.py to the end first")
        with tempfile.TemporaryDirectory(prefix="fluid-forget-", dir=storage.scratch()) as scratch:
            new = _rewrite(storage, record, dataset.manifest, entries, Path(scratch))
        if new is not None:
            done.samples += record.rows - new.rows
            done.shards += 1
            storage.put_bytes(new.dumps().encode(), Ledger.name(shard.id), overwrite=True)
        records.append(new or record)
    shards = [
        shard.model_copy(update=from_record(record)) for shard, record in zip(dataset.manifest.shards, records, strict=True)
    ]
    manifest = dataset.manifest.model_copy(update={"shards": shards, **totals(records)})
    if manifest.hash != dataset.manifest.hash:
        storage.put_bytes(manifest.dumps().encode(), "manifest.json", overwrite=True)
    storage.clean_scratch()
    return done


def _rewrite(storage: Storage, record: ShardRecord, manifest: Manifest, entries: OptOut, scratch: Path) -> ShardRecord | None:
    """The shard's new record, or None where nothing is to be done."""
    if not record.rows:
        return None
    name = f"{{}}/{record.id}.parquet"
    latents = pq.ParquetFile(storage.fetch(name.format("latents"), scratch))
    about = latents.read(columns=["key", "sha256", "metadata"]).to_pylist()
    gone = {row["key"] for row in about if entries.holds(row["key"], row["sha256"], json.loads(row["metadata"]))}
    if not gone and len(about) == record.rows:
        return None
    new = record.model_copy(deep=True)
    forgotten = _quarantine(storage, new, gone, scratch)
    if record.text_sha256 is not None:
        text = pq.ParquetFile(storage.fetch(name.format("text"), scratch))
        path = _without(text, gone, scratch / "text.parquet")
        new.text_bytes, new.text_sha256 = path.stat().st_size, file_sha256(path)
        storage.put_file(path, name.format("text"), overwrite=True)
    path = _without(latents, gone, scratch / "latents.parquet")
    rewritten = pq.ParquetFile(path)
    new.bytes, new.sha256 = path.stat().st_size, file_sha256(path)
    new.row_groups = [rewritten.metadata.row_group(i).num_rows for i in range(rewritten.metadata.num_row_groups)]
    new.rows = sum(new.row_groups)
    new.filtered = dict(sorted({**record.filtered, REASON: forgotten}.items()))
    if record.shapes is not None:
        groups = [rewritten.read_row_group(i, columns=["latent_size"]) for i in range(rewritten.num_row_groups)]
        new.shapes = [group["latent_size"][0].as_py() for group in groups]
    _measure(new, rewritten, manifest)
    storage.put_file(path, name.format("latents"), overwrite=True)
    new.check()
    return new


def _quarantine(storage: Storage, record: ShardRecord, gone: set[str], scratch: Path) -> int:
    """Add the keys to the quarantine file; returns how many samples of the shard are forgotten in all."""
    name = f"quarantine/{record.id}.parquet"
    rows = pq.read_table(storage.fetch(name, scratch)).to_pylist() if storage.size_or_none(name) is not None else []
    known = {row["key"] for row in rows if row["reason"] == REASON}
    rows += [{"key": key, "status": "filtered", "reason": REASON} for key in sorted(gone - known)]
    write_quarantine(scratch / "quarantine.parquet", rows)
    storage.put_file(scratch / "quarantine.parquet", name, overwrite=True)
    record.quarantine_rows = len(rows)
    return len(known | gone)


def _without(file: pq.ParquetFile, gone: set[str], path: Path) -> Path:
    """A copy without the rows of these keys, group by group; groups that are left empty go."""
    writer = RowGroupWriter(path, file.schema_arrow)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        table = table.filter(pa.array([key not in gone for key in table["key"].to_pylist()]))
        if table.num_rows:
            writer.write_table(table)
    writer.close()
    return path


def _measure(record: ShardRecord, file: pq.ParquetFile, manifest: Manifest) -> None:
    """Statistics and histograms of the rows that are left."""
    histograms = Histograms()
    statistics: LatentStatistics | None = None
    item = manifest.numpy_token_dtype().itemsize
    columns = ["width", "height", "token_ids", *(["moments"] if manifest.kind == "kl" else [])]
    for group in range(file.num_row_groups):
        rows: dict[str, list[Any]] = file.read_row_group(group, columns=columns).to_pydict()
        for width, height, ids in zip(rows["width"], rows["height"], rows["token_ids"], strict=True):
            histograms.count(width, height, [len(value) // item for value in ids])
        if manifest.kind == "kl":
            part = LatentStatistics.of_bytes(rows["moments"], manifest.latent_shape[0])
            statistics = part if statistics is None else statistics.merge(part)
    record.histograms = histograms.as_json() if record.rows else {}
    record.captions = histograms.total_captions
    record.captions_cut = min(record.captions_cut, record.captions)
    record.statistics = statistics.as_json() if statistics else None
    if not record.rows:
        record.text_cosine = None
