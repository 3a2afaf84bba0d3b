"""Samples of one source shard, in a fixed order: webdataset and img2dataset tars, Parquet with bytes or paths, plain folders.

Nothing here raises for what a shard contains: each defect is yielded as `Rejected` with its reason, so that
in = out + filtered + quarantined holds whatever the shard looks like. Storage errors do raise (fluid_core/data/storage.py).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fluid_core.data.files import read_files
from fluid_core.data.parquet import read_parquet
from fluid_core.data.plan import PlannedShard
from fluid_core.data.samples import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, RawSample, Rejected, finish_sample, parse_metadata
from fluid_core.data.storage import Storage, open_storage
from fluid_core.data.tar import Member, index_tar, plain_name

MAX_TEXT_BYTES = 16 << 20
MAX_IMAGE_BYTES = 256 << 20


@dataclass
class _Group:
    """Members of one sample."""

    image: Member | None = None
    texts: dict[str, Member] = field(default_factory=dict)
    metadata: Member | None = None


def read_tar(
    path: Path,
    caption_fields: tuple[str, ...] = (),
    start: int = 0,
    stop: int | None = None,
) -> Iterator[RawSample | Rejected]:
    """Samples of a webdataset tar, in the order in which their keys first appear.

    A key is the member's name without its known extension, so keys may contain dots. Further captions of `KEY.jpg` may lie in
    `KEY.NAME.txt`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        index = index_tar(partial(os.pread, descriptor), os.fstat(descriptor).st_size, start, stop)
        groups, duplicates, foreign = _group(index.members)
        for fault in index.faults:
            yield Rejected(plain_name(fault.name) or f"{path.name}#{fault.reason}", fault.reason, fault.detail)
        for key in duplicates:
            yield Rejected(
                plain_name(key), "duplicate_member", "the archive holds this member more than once; the first counts"
            )
        for name in foreign:
            yield Rejected(plain_name(name), "caption_without_image", "no image member has this key")
        for key, group in groups.items():
            yield _tar_sample(descriptor, plain_name(key), group, caption_fields)
    finally:
        os.close(descriptor)


def read_shard(shard: PlannedShard, scratch: Path, caption_fields: Sequence[str] = ()) -> Iterator[RawSample | Rejected]:
    """Samples of a planned shard; what lies on S3 is fetched into `scratch` first (of a cut tar its range): a broken
    connection costs no sample.

    Keys that the index file of img2dataset promises, and that are not there, come last as `missing_member`.
    """
    storage = open_storage(shard.root)
    whole = not shard.start and shard.stop < 0
    expected = _index_keys(storage, shard.name, scratch) if whole and shard.format != "parquet" else []
    seen: set[str] = set()
    for sample in _read(shard, storage, scratch, tuple(caption_fields)):
        if expected:
            seen.add(sample.key)
        yield sample
    for key in expected:
        if key not in seen:
            yield Rejected(key, "missing_member", "the shard's index file lists it, the shard does not hold it")


def _read(shard: PlannedShard, storage: Storage, scratch: Path, fields: tuple[str, ...]) -> Iterator[RawSample | Rejected]:
    stop = None if shard.stop < 0 else shard.stop
    if shard.format == "tar":
        return read_tar(storage.fetch(shard.name, scratch, shard.start, stop), fields, shard.start, stop)
    if shard.format == "parquet":
        return read_parquet(storage, shard.name, scratch, fields, MAX_IMAGE_BYTES, shard.start, stop)
    return read_files(storage, shard.name, fields, MAX_IMAGE_BYTES)


def _index_keys(storage: Storage, name: str, scratch: Path) -> list[str]:
    """Keys of the successful downloads in img2dataset's index (`00000.parquet` beside `00000.tar` or the folder `00000`),
    where there is one."""
    index = f"{name.removesuffix('.tar')}.parquet"
    if storage.size_or_none(index) is None:
        return []
    path = storage.fetch(index, scratch)
    try:
        table = pq.read_table(path, columns=["key", "status"])
    except (pa.ArrowException, OSError, KeyError):  # another program's file
        return []
    return [
        key for key, status in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True) if status == "success"
    ]


def _group(members: list[Member]) -> tuple[dict[str, _Group], list[str], list[str]]:
    """(samples by key, keys with repeated members, texts that belong to no image)."""
    groups: dict[str, _Group] = {}
    repeated: dict[str, None] = {}
    texts: list[tuple[str, str, Member]] = []
    for member in members:
        stem, _, extension = member.name.rpartition(".")
        extension = extension.lower()
        if extension in IMAGE_EXTENSIONS:
            group = groups.setdefault(stem, _Group())
            if group.image is None:
                group.image = member
            else:
                repeated[stem] = None
        elif extension in CAPTION_EXTENSIONS or extension == "json":
            texts.append((stem, extension, member))
    orphans: dict[str, None] = {}
    for stem, extension, member in texts:
        base, _, label = stem.rpartition(".")
        if stem in groups:
            name = extension
        elif base in groups and extension != "json":
            stem, name = base, f"{label}.{extension}"
        else:
            orphans[stem] = None
            continue
        group = groups[stem]
        if extension == "json":
            repeated.update({stem: None} if group.metadata else {})
            group.metadata = group.metadata or member
        elif name in group.texts:
            repeated[stem] = None
        else:
            group.texts[name] = member
    return groups, list(repeated), list(orphans)


def _tar_sample(descriptor: int, key: str, group: _Group, caption_fields: tuple[str, ...]) -> RawSample | Rejected:
    assert group.image is not None
    metadata: dict[str, Any] = {}
    if group.image.size > MAX_IMAGE_BYTES:
        return Rejected(key, "image_too_many_bytes", f"{group.image.size} bytes")
    captions = []
    # KEY.txt first, then KEY.NAME.txt by name.
    for name in sorted(group.texts, key=lambda n: ("." in n, n)):
        member = group.texts[name]
        if member.size > MAX_TEXT_BYTES:
            return Rejected(key, "caption_too_many_bytes", f"{member.size} bytes")
        try:
            captions.append(os.pread(descriptor, member.size, member.offset).decode("utf-8"))
        except UnicodeDecodeError as error:
            return Rejected(key, "caption_not_utf8", f"{plain_name(member.name)}: {error.reason}")
    if group.metadata is not None:
        if group.metadata.size > MAX_TEXT_BYTES:
            return Rejected(key, "bad_metadata", f"{group.metadata.size} bytes of JSON")
        values = parse_metadata(os.pread(descriptor, group.metadata.size, group.metadata.offset))
        if values is None:
            return Rejected(key, "bad_metadata", f"{plain_name(group.metadata.name)} is not a JSON object")
        metadata = values
    image = _pread_all(descriptor, group.image.size, group.image.offset)
    return finish_sample(key, image, captions, metadata, caption_fields)


def _pread_all(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # pread may return less on network file systems
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
