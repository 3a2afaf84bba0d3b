"""Samples of one source shard, in a fixed order: webdataset and img2dataset tars, Parquet with bytes or paths, plain folders.

Nothing here raises for what a shard contains: each defect is yielded as `Rejected` with its reason, so that
in = out + filtered + quarantined holds whatever the shard looks like. Storage errors do raise (fluid_core/data/storage.py).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    order: int = 0


def read_tar(
    path: Path,
    caption_fields: tuple[str, ...] = (),
    start: int = 0,
    stop: int | None = None,
    expected: list[str] | None = None,
) -> Iterator[RawSample | Rejected]:
    """Samples of a webdataset tar, in the order in which their keys first appear.

    A key is the member's name without its known extension, so keys may contain dots. Further captions of `KEY.jpg` may lie in
    `KEY.NAME.txt`. `expected`: keys that the index file of img2dataset promises; those that the tar lacks are reported.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        index = index_tar(descriptor, start, stop)
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
        if expected is not None:
            present = {plain_name(key) for key in groups}
            for key in expected:
                if key not in present:
                    yield Rejected(key, "missing_member", "the shard's index file lists it, the archive does not hold it")
    finally:
        os.close(descriptor)


def read_shard(shard: PlannedShard, scratch: Path, caption_fields: Sequence[str] = ()) -> Iterator[RawSample | Rejected]:
    """Samples of a planned shard; what lies on S3 is fetched into `scratch` first: a broken connection costs no sample."""
    fields = tuple(caption_fields)
    storage = open_storage(shard.root)
    stop = None if shard.stop < 0 else shard.stop
    if shard.format == "tar":
        path = storage.fetch(shard.name, scratch)
        expected = None if shard.start or stop is not None else _index_keys(storage, shard.name, scratch)
        yield from read_tar(path, fields, shard.start, stop, expected)
    elif shard.format == "parquet":
        yield from read_parquet(storage, shard.name, scratch, fields, MAX_IMAGE_BYTES, shard.start, stop)
    else:
        yield from read_files(storage, shard.name, fields, MAX_IMAGE_BYTES)


def _index_keys(storage: Storage, name: str, scratch: Path) -> list[str] | None:
    """Keys of the successful downloads in img2dataset's index (`00000.parquet` beside `00000.tar`), where there is one."""
    index = f"{name.removesuffix('.tar')}.parquet"
    if storage.size_or_none(index) is None:
        return None
    try:
        table = pq.read_table(storage.fetch(index, scratch), columns=["key", "status"])
    except (pa.ArrowException, OSError, KeyError):  # another program's file
        return None
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
