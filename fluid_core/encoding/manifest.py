"""From the ledger to the manifest: a pure function, so that every way to the same commits ends with the same file."""

import json
from collections.abc import Sequence
from typing import Any

from fluid_core.data.plan import PlannedShard
from fluid_core.data.storage import Storage
from fluid_core.encoding.ledger import ShardRecord
from fluid_core.encoding.settings import EncodeSettings
from fluid_core.encoding.statistics import Histograms, LatentStatistics
from fluid_core.latents.manifest import Manifest, Shard


def build_manifest(
    settings: EncodeSettings, plan: Sequence[PlannedShard], records: Sequence[ShardRecord], null_text: dict[str, Any]
) -> Manifest:
    """`records`: one for each shard of the plan that is no duplicate, in plan order."""
    statistics = LatentStatistics.empty(settings.encoders.latent_channels)
    for record in records:
        if record.statistics is not None:
            statistics = statistics.merge(LatentStatistics.from_json(record.statistics))
    shards = []
    for planned, record in zip([shard for shard in plan if not shard.duplicate_of], records, strict=True):
        shards.append(Shard(uri=planned.uri, source=planned.source, weight=planned.weight, **from_record(record)))
    return Manifest(
        kind=settings.kind,
        image_size=settings.image_size,
        latent_shape=settings.latent_shape,
        encoders={"image": settings.encoders.image, "text": settings.encoders.text},
        flip=settings.flip,
        text_mode=settings.text_mode,
        text_dtype=settings.text_dtype,
        token_dtype=settings.token_dtype,
        null_text=null_text,
        settings=settings.fingerprint(),
        settings_hash=settings.hash,
        duplicate_shards=[{"uri": s.uri, "duplicate_of": s.duplicate_of} for s in plan if s.duplicate_of],
        shards=shards,
        **totals(records),
    )


def from_record(record: ShardRecord) -> dict[str, Any]:
    """What the manifest's entry of a shard takes from its ledger record."""
    names = (
        "id",
        "rows",
        "row_groups",
        "shapes",
        "bytes",
        "sha256",
        "text_bytes",
        "text_sha256",
        "quarantine_rows",
        "set_aside",
    )
    return {name: getattr(record, name) for name in names}


def totals(records: Sequence[ShardRecord]) -> dict[str, Any]:
    """Fields of the manifest that are sums over the ledger."""
    statistics: LatentStatistics | None = None
    for record in records:
        if record.statistics is not None:
            part = LatentStatistics.from_json(record.statistics)
            statistics = part if statistics is None else statistics.merge(part)
    return {
        "latent_mean": statistics.mean.tolist() if statistics else [],
        "latent_std": statistics.std.tolist() if statistics else [],
        "counts": total_counts(records),
        "histograms": Histograms.merge(record.histograms for record in records),
        "text_cosine": _merge_cosines(records),
    }


def total_counts(records: Sequence[ShardRecord]) -> dict[str, Any]:
    """{"in", "out", "filtered": {reason: n}, "quarantined": {reason: n}, "captions", "captions_cut", "shards_set_aside"}."""
    filtered: dict[str, int] = {}
    quarantined: dict[str, int] = {}
    for record in records:
        for total, part in ((filtered, record.filtered), (quarantined, record.quarantined)):
            for reason, number in part.items():
                total[reason] = total.get(reason, 0) + number
    counts: dict[str, Any] = {
        "in": sum(r.samples_in for r in records),
        "out": sum(r.rows for r in records),
        "filtered": dict(sorted(filtered.items())),
        "quarantined": dict(sorted(quarantined.items())),
        "captions": sum(r.captions for r in records),
        "captions_cut": sum(r.captions_cut for r in records),
        "shards_set_aside": sum(r.set_aside for r in records),
    }
    assert counts["in"] == counts["out"] + sum(filtered.values()) + sum(quarantined.values())
    return counts


def _merge_cosines(records: Sequence[ShardRecord]) -> dict[str, float] | None:
    parts = [record.text_cosine for record in records if record.text_cosine]
    if not parts:
        return None
    tokens = sum(part["tokens"] for part in parts)
    return {"mean": sum(part["sum"] for part in parts) / tokens, "min": min(part["min"] for part in parts)}


def read_null_text(storage: Storage) -> dict[str, Any]:
    data = storage.read_or_none("_null_text.json")
    assert data is not None, f"{storage.root}/_null_text.json is written by the first encode worker"
    return json.loads(data)
