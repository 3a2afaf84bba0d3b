"""LAION-style webdataset shards with deterministic bytes: same samples, same tars, on any machine and at any time."""

import errno
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict


class ShardSample(TypedDict):
    """One image-text pair. `metadata` becomes KEY.json, `caption` KEY.txt, `image_bytes` KEY.extension."""

    __key__: str
    image_bytes: bytes
    extension: str
    caption: str
    metadata: dict[str, Any]


def require_disk(folder: str | Path, needed_bytes: int) -> None:
    """Raise a one-line ValueError when the disk under `folder` has less than `needed_bytes` free, or is not writable."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create {folder}: {error.strerror}; name another output folder in the recipe") from None
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"{folder}: {free / 2**20:,.0f} MiB free, about {needed_bytes / 2**20:,.0f} MiB needed; "
            "free some space or name another folder in the recipe"
        )


def write_shards(samples: Iterable[ShardSample], folder: str | Path, samples_per_shard: int) -> list[Path]:
    """Write samples as 00000.tar, 00001.tar, ... and return their paths. Tars of an earlier, longer run are removed.

    Raises:
        ValueError: a key with a dot (webdataset splits names there), a repeated key, or no space left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    written: list[Path] = []
    try:
        for index, batch in enumerate(_batches(samples, samples_per_shard)):
            path = folder / f"{index:05d}.tar"
            partial = path.with_suffix(".tar.partial")
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in batch:
                    _add(tar, sample, seen)
            partial.replace(path)
            written.append(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(f"no space left on the disk of {folder}; free some space and run again") from None
        raise
    for stale in [*folder.glob("*.tar"), *folder.glob("*.partial")]:
        if stale not in written:
            stale.unlink()
    return written


def _batches(samples: Iterable[ShardSample], size: int) -> Iterator[list[ShardSample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def _add(tar: tarfile.TarFile, sample: ShardSample, seen: set[str]) -> None:
    key = sample["__key__"]
    if "." in key or "/" in key:
        raise ValueError(f"sample key {key!r} has a dot or a slash: webdataset readers would split it there")
    if key in seen:
        raise ValueError(f"sample key {key!r} occurs twice")
    seen.add(key)
    metadata = json.dumps(sample["metadata"], sort_keys=True, ensure_ascii=False)
    members = ((sample["extension"], sample["image_bytes"]), ("txt", sample["caption"].encode()), ("json", metadata.encode()))
    for extension, content in members:
        info = tarfile.TarInfo(f"{key}.{extension}")  # TarInfo's own defaults: mtime 0, uid 0, mode 0644
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
