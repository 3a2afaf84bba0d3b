"""Exact de-duplication by image hash: the first occurrence wins, in an order that does not depend on workers or kills.

One pass reads every shard and keeps (hash, position) of the samples that pass the filters before decoding; then the hashes
are compared, part by part, and each shard gets the list of positions that it must drop. The lists are stored in the output:
a restart uses the same ones. When the sources have grown since, shards that are committed keep what they hold.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from fluid_core.config import EncodeConfig
from fluid_core.data.filters import OptOut, SampleFilter, image_sha256
from fluid_core.data.plan import PlannedShard
from fluid_core.data.reader import read_shard
from fluid_core.data.samples import Rejected
from fluid_core.data.storage import Storage, TransientError, absolute, open_storage
from fluid_core.encoding.ledger import Ledger
from fluid_core.encoding.scratch import no_space, scratch_folder
from fluid_core.encoding.settings import EncodeSettings

HASHES = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])
PART_RECORDS = 50_000_000
Records = NDArray[Any]


def hashes_name(shard_id: str) -> str:
    return f"_duplicates/{shard_id}.hashes"


def dropped_name(shard_id: str) -> str:
    return f"_duplicates/{shard_id}.drop"


def records_of(hexes: Sequence[str], positions: Sequence[int]) -> Records:
    """The first 128 bits of each sha256 with its position."""
    records = np.empty(len(hexes), dtype=HASHES)
    records["high"] = [int(h[:16], 16) for h in hexes]
    records["low"] = [int(h[16:32], 16) for h in hexes]
    records["position"] = positions
    return records


class HashShards:
    """A Ray Data task: writes the hashes of one shard, returns what went wrong, if anything did."""

    def __init__(self, settings: EncodeSettings):
        self.settings = settings
        self.filter = SampleFilter(settings.filters, OptOut.read(settings.filters.opt_out))

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        for text in batch["work"]:
            work = json.loads(text)
            failure = ""
            try:
                self.hash_shard(PlannedShard(**work["shard"]), open_storage(work["output"]))
            except (ValueError, TransientError, PermissionError, FileNotFoundError) as error:
                failure = str(error)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                failure = no_space(self.settings.scratch)
            yield {"failure": [failure]}

    def hash_shard(self, shard: PlannedShard, output: Storage) -> None:
        hexes, positions = [], []
        scratch = scratch_folder("fluid-hash-", self.settings.scratch)
        try:
            for position, sample in enumerate(read_shard(shard, scratch, self.settings.caption_fields)):
                if not isinstance(sample, Rejected):
                    sha256 = image_sha256(sample.image)
                    if self.filter.reason(sample, sha256) is None:
                        hexes.append(sha256)
                        positions.append(position)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        output.put_bytes(records_of(hexes, positions).tobytes(), hashes_name(shard.id), overwrite=False)


def find_duplicates(storage: Storage, plan: Sequence[PlannedShard], settings: EncodeSettings, config: EncodeConfig) -> None:
    """Write the drop list of every shard of the plan. Needs a connected Ray where hashes are missing.

    Raises:
        ValueError, ConnectionError: a shard that cannot be read.
    """
    shards = [shard for shard in plan if not shard.duplicate_of]
    against = settings.filters.deduplicate_against
    marker = hashlib.sha256(json.dumps([[shard.id for shard in shards], against]).encode()).hexdigest()
    if storage.read_or_none("_duplicates/plan") == marker.encode():
        return
    there = {o.name for o in storage.list("_duplicates/")}
    _hash_missing([shard for shard in shards if hashes_name(shard.id) not in there], storage, settings, config)
    done = Ledger(storage).ids()
    # What is committed is in the data set: it comes first, without what it dropped itself.
    order = sorted(range(len(shards)), key=lambda i: (shards[i].id not in done, i))
    records = [_read(storage, hashes_name(shards[i].id), HASHES) for i in order]
    for n, i in enumerate(order):
        if shards[i].id in done:
            own = _read(storage, dropped_name(shards[i].id), np.dtype("<i8"))
            records[n] = records[n][~np.isin(records[n]["position"], own)]
    known = _known_hashes(against) if against else records_of([], [])
    drops = drop_lists([known, *records])[1:]
    for i, positions in zip(order, drops, strict=True):
        if shards[i].id not in done:
            storage.put_bytes(positions.tobytes(), dropped_name(shards[i].id), overwrite=True)
    storage.put_bytes(marker.encode(), "_duplicates/plan", overwrite=True)


def drop_lists(groups: Sequence[Records]) -> list[NDArray[np.int64]]:
    """For each group in order, the sorted positions of its records whose hash occurred before (in it or in an earlier one)."""
    total = sum(len(group) for group in groups)
    parts = max(1, -(-total // PART_RECORDS))
    dropped: list[list[NDArray[np.int64]]] = [[] for _ in groups]
    for part in range(parts):
        # Hashes are uniform: a part is those whose upper bits fall to it.
        chosen = [g[(g["high"] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part] for g in groups]
        flat = np.concatenate(chosen)
        group_of = np.repeat(np.arange(len(groups)), [len(c) for c in chosen])
        order = np.lexsort((np.arange(len(flat)), flat["low"], flat["high"]))
        same = np.zeros(len(flat), dtype=bool)
        ordered = flat[order]
        same[order[1:]] = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
        for group in np.unique(group_of[same]):
            dropped[group].append(flat["position"][same & (group_of == group)])
    empty = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([empty, *positions])) for positions in dropped]


def _read(storage: Storage, name: str, dtype: np.dtype[Any]) -> Records:
    return np.frombuffer(storage.read_or_none(name) or b"", dtype=dtype)


def _known_hashes(root: str) -> Records:
    """Hashes of an encoded data set."""
    from fluid_core.latents.reader import EncodedDataset  # imports torch

    dataset = EncodedDataset(root)
    hexes: list[str] = []
    for shard in tqdm(dataset.manifest.shards, desc="known hashes", unit="shard", disable=None, leave=False):
        if shard.rows:
            file = pq.ParquetFile(dataset.storage.open_input(f"latents/{shard.id}.parquet"))
            hexes.extend(file.read(columns=["sha256"])["sha256"].to_pylist())
    return records_of(hexes, [-1] * len(hexes))


def _hash_missing(shards: Sequence[PlannedShard], storage: Storage, settings: EncodeSettings, config: EncodeConfig) -> None:
    if not shards:
        return
    import ray
    from ray.data import TaskPoolStrategy

    work = [{"shard": asdict(replace(shard, root=absolute(shard.root))), "output": absolute(storage.root)} for shard in shards]
    dataset = ray.data.from_items([{"work": json.dumps(item)} for item in work], override_num_blocks=len(work))
    hashed = dataset.map_batches(
        HashShards(settings).__call__, batch_size=1, compute=TaskPoolStrategy(size=config.decode_workers), num_cpus=1
    )
    for row in tqdm(hashed.iter_rows(), total=len(shards), desc="hashing images", unit="shard", disable=None, leave=False):
        if row["failure"]:
            raise ValueError(row["failure"])
