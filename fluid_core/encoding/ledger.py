"""The ledger: one record a shard, written last. What has a record is done; everything else is done again.

A record says only what follows from the shard's content and the settings, never who wrote it or when, so that it does not
matter which of two racing encoders gets it in.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict

from fluid_core.data.storage import Storage


class ShardRecord(BaseModel):
    """`<root>/_ledger/<id>.json`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    settings_hash: str
    rows: int
    row_groups: list[int]
    shapes: list[list[int]] | None = None
    bytes: int
    sha256: str
    text_bytes: int = 0
    text_sha256: str | None = None
    quarantine_rows: int = 0
    set_aside: bool = False
    samples_in: int
    filtered: dict[str, int]
    quarantined: dict[str, int]
    statistics: dict[str, Any] | None = None
    histograms: dict[str, dict[str, int]] = {}
    captions: int = 0
    captions_cut: int = 0
    text_cosine: dict[str, float] | None = None

    def check(self) -> None:
        """The sum that every shard must satisfy."""
        gone = sum(self.filtered.values()) + sum(self.quarantined.values())
        assert self.samples_in == self.rows + gone, f"shard {self.id}: {self.samples_in} in, {self.rows} out, {gone} dropped"

    def dumps(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n"


class Ledger:
    """The records of one output."""

    def __init__(self, storage: Storage):
        self.storage = storage

    @staticmethod
    def name(shard_id: str) -> str:
        return f"_ledger/{shard_id}.json"

    def ids(self) -> set[str]:
        """Ids of committed shards: one listing, no reads."""
        return {
            o.name.removeprefix("_ledger/").removesuffix(".json")
            for o in self.storage.list("_ledger/")
            if o.name.endswith(".json")
        }

    def read(self, shard_id: str) -> ShardRecord | None:
        data = self.storage.read_or_none(self.name(shard_id))
        if data is None:
            return None
        try:
            return ShardRecord.model_validate_json(data)
        except ValueError:
            where = self.storage.uri(self.name(shard_id))
            raise ValueError(f"{where} is not a ledger record; delete it and run again to encode its shard anew") from None

    def read_all(self, shard_ids: list[str]) -> list[ShardRecord | None]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.read, shard_ids))

    def commit(self, record: ShardRecord) -> bool:
        """True when this call made the record, False when another encoder was first."""
        record.check()
        return self.storage.put_bytes(record.dumps().encode(), self.name(record.id), overwrite=False)
