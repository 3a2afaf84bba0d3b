"""The plan: every input shard once, in a fixed order, with an id that depends on its content alone.

    plan = make_plan(["2::s3://bucket/laion/*.tar", "1::/data/own"])

`plan.parquet` in the output lists them. A shard whose bytes occur a second time under another name is refused: it is listed
with `duplicate_of` and not read.
"""

import fnmatch
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from fluid_core.data.samples import IMAGE_EXTENSIONS
from fluid_core.data.storage import CHUNK_BYTES, Storage, StoredObject, open_storage
from fluid_core.data.tar import Member, ReadAt, index_tar

BYTES_PER_SAMPLE_AT_LEAST = 4096
HEAD_BYTES = 1 << 20
"""What is read of an S3 tar to tell whether it may be a giant."""
REQUESTS = 16
"""To S3 at a time."""


@dataclass(frozen=True)
class PlannedShard:
    """One unit of work, one output shard."""

    id: str
    uri: str
    root: str
    name: str
    format: str
    """tar, parquet or files"""
    size: int
    version: str
    etag: str
    """sha256 of a local file, the ETag of an S3 object: in one store the same for the same bytes."""
    source: str
    weight: float
    start: int = 0
    stop: int = -1
    """Part of a giant shard: byte range of a tar, rows of a Parquet file; -1 means to the end."""
    duplicate_of: str = ""
    sha256: str = ""
    """Of an S3 object that was compared with a shard whose etag is of another kind."""


_TYPES = {"size": pa.int64(), "start": pa.int64(), "stop": pa.int64(), "weight": pa.float64()}
PLAN_SCHEMA = pa.schema([(column.name, _TYPES.get(column.name, pa.string())) for column in fields(PlannedShard)])


def make_plan(
    sources: Sequence[str],
    max_shard_samples: int = 1 << 62,
    known: Iterable[PlannedShard] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PlannedShard]:
    """List the sources, hash what must be hashed, mix by weight, cut giant shards.

    Args:
        sources: `[WEIGHT::]path`: a file, a glob or a folder, local or s3://.
        max_shard_samples: a shard with more samples is cut into several outputs (counted only where the size allows it).
        known: an earlier plan of the same output; what has the same size and version is not hashed again.
        progress: called with (bytes hashed, bytes to hash).

    Raises:
        ValueError: a source that does not exist, matches nothing, or has a wrong weight.
        AccessError, TransientError: a store that refuses or does not answer.
    """
    if not sources:
        raise ValueError("no sources: name folders, tars or Parquet files under data.sources")
    known = list(known)
    listed = [_list_source(source) for source in sources]
    _hash_local([shard for _, shards in listed for shard in shards], known, progress, listed)
    store = functools.cache(open_storage)
    ordered = _hash_doubtful(_interleave(listed), known, progress, store)
    planned: list[PlannedShard] = []
    first_with: dict[str, str] = {}
    for shard in ordered:
        identity, *further = [f"{shard.format}:{e}:{shard.size}" for e in (shard.etag, shard.sha256) if e]
        duplicate_of = next((first_with[i] for i in (identity, *further) if i in first_with), "")
        planned.append(replace(shard, id=hashlib.sha256(identity.encode()).hexdigest()[:16], duplicate_of=duplicate_of))
        for each in (identity, *further):
            first_with.setdefault(each, shard.uri)
    with ThreadPoolExecutor(REQUESTS) as pool:
        parts = pool.map(lambda s: [s] if s.duplicate_of else split_giant(s, max_shard_samples, store(s.root)), planned)
        return [part for parts_of_one in parts for part in parts_of_one]


def parse_source(source: str) -> tuple[float, str]:
    """`2::s3://bucket/x` -> (2.0, "s3://bucket/x")."""
    weight_text, separator, path = source.rpartition("::")
    if not separator:
        return 1.0, source
    try:
        weight = float(weight_text)
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise ValueError(f"source {source!r}: the weight before :: must be a positive number, as in 2::{path}")
    return weight, path


def _list_source(source: str) -> tuple[float, list[PlannedShard]]:
    weight, path = parse_source(source)
    root, pattern = _split_pattern(path)
    storage = open_storage(root)
    if pattern is None:  # one file, or a folder
        single = _single_file(path)
        if single is not None:
            storage, objects = single
        else:
            objects = list(storage.list())
            if not objects:
                raise ValueError(
                    f"source {path} does not exist or is empty; data.sources takes tars, Parquet files, folders or globs"
                )
    else:
        prefix = pattern.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
        objects = [o for o in storage.list(prefix) if fnmatch.fnmatchcase(o.name, pattern)]
    shards = _shards_of(storage, objects, path, weight)
    if not shards:
        raise ValueError(f"source {path} matches no tar, no Parquet file and no folder of images; check data.sources")
    return weight, shards


def _split_pattern(path: str) -> tuple[str, str | None]:
    """(folder without wildcards, pattern below it or None)."""
    parts = path.rstrip("/").split("/")
    for i, part in enumerate(parts):
        if any(c in part for c in "*?["):
            return "/".join(parts[:i]) or ("/" if path.startswith("/") else "."), "/".join(parts[i:])
    return path, None


def _single_file(path: str) -> tuple[Storage, list[StoredObject]] | None:
    if not path.endswith((".tar", ".parquet")):
        return None
    folder, _, name = path.rpartition("/")
    storage = open_storage(folder or ("/" if path.startswith("/") else "."))
    if "://" not in path:
        if os.path.isdir(path):
            return None
        if not os.path.isfile(path):
            raise ValueError(f"source {path} does not exist; data.sources takes tars, Parquet files, folders or globs")
        stat = os.stat(path)
        return storage, [StoredObject(name, stat.st_size, str(stat.st_mtime_ns))]
    objects = [o for o in storage.list(name) if o.name == name]
    return (storage, objects) if objects else None


def _shards_of(storage: Storage, objects: list[StoredObject], source: str, weight: float) -> list[PlannedShard]:
    """Tars are shards; Parquet files are, unless they are the index beside a tar or beside a folder of files; images in
    folders make one shard a folder."""

    def shard(name: str, kind: str, size: int, version: str, etag: str = "") -> PlannedShard:
        uri = storage.uri(name)
        return PlannedShard("", uri, storage.root, name, kind, size, version, etag, source, weight)

    tars = {o.name for o in objects if o.name.endswith(".tar")}
    folders: dict[str, list[StoredObject]] = {}
    for o in objects:
        if _is_part(o.name):
            folders.setdefault(str(PurePosixPath(o.name).parent), []).append(o)
    folders = {
        name: items
        for name, items in folders.items()
        if any(o.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for o in items)
    }
    found = [shard(o.name, "tar", o.size, o.version) for o in objects if o.name.endswith(".tar")]
    for o in objects:
        stem = o.name.removesuffix(".parquet")
        if o.name.endswith(".parquet") and f"{stem}.tar" not in tars and stem not in folders:
            found.append(shard(o.name, "parquet", o.size, o.version))
    for name, items in sorted(folders.items()):
        if f"{name}.tar" not in tars:
            listing = "\n".join(f"{PurePosixPath(o.name).name} {o.size} {o.version}" for o in items)
            found.append(shard(name, "files", sum(o.size for o in items), hashlib.sha256(listing.encode()).hexdigest()))
    if "://" in storage.root:
        found = [replace(s, etag=s.version) for s in found]
    return sorted(found, key=lambda s: s.name)


def _hash_local(
    shards: list[PlannedShard],
    known: Iterable[PlannedShard],
    progress: Callable[[int, int], None],
    listed: list[tuple[float, list[PlannedShard]]],
) -> None:
    """Fill in the etags of local files, in place: duplicates are told by content, and ids do not depend on where data lies."""
    before = {(shard.uri, shard.size, shard.version): shard.etag for shard in known}
    missing = sorted(
        {s.uri: s for s in shards if not s.etag and (s.uri, s.size, s.version) not in before}.values(), key=lambda s: s.uri
    )
    total, done = sum(s.size for s in missing), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard, digest in zip(missing, pool.map(_local_sha256, missing), strict=True):
            before[(shard.uri, shard.size, shard.version)] = digest
            done += shard.size
            progress(done, total)
    for _, of_source in listed:
        of_source[:] = [s if s.etag else replace(s, etag=before[(s.uri, s.size, s.version)]) for s in of_source]


def _local_sha256(shard: PlannedShard) -> str:
    """Of a file's bytes; of a folder, of its files' names and bytes."""
    if shard.format != "files":
        return _file_sha256(shard.uri)
    names = sorted(entry.name for entry in os.scandir(shard.uri) if entry.is_file() and _is_part(entry.name))
    return hashlib.sha256("\n".join(f"{name} {_file_sha256(f'{shard.uri}/{name}')}" for name in names).encode()).hexdigest()


def _is_part(name: str) -> bool:
    """Whether a folder of images counts this file."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS or name.endswith((".txt", ".json"))


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_doubtful(
    shards: list[PlannedShard],
    known: Iterable[PlannedShard],
    progress: Callable[[int, int], None],
    store: Callable[[str], Storage],
) -> list[PlannedShard]:
    """Fill in the sha256 of S3 objects that may be copies although no etag tells so.

    An ETag is the MD5 of an object only where it was uploaded in one part, and a local file's etag is its sha256. So shards of
    one format and size with etags of different kinds are compared: first their heads, and where these agree too, their hashes.
    """

    def kind(shard: PlannedShard) -> str:
        """Etags of one kind are equal for the same bytes: local, or of as many parts."""
        return f"{shard.etag.partition('-')[2]} parts" if "://" in shard.root else "local"

    def in_doubt(found: Iterable[PlannedShard], tell: Callable[[PlannedShard], object]) -> list[PlannedShard]:
        alike: dict[object, list[PlannedShard]] = {}
        for shard in found:
            alike.setdefault(tell(shard), []).append(shard)
        return [shard for group in alike.values() if len({kind(shard) for shard in group}) > 1 for shard in group]

    def digest(shard: PlannedShard) -> str:
        sha256 = hashlib.sha256()
        for offset in range(0, shard.size, CHUNK_BYTES):
            sha256.update(store(shard.root).read_at(shard.name, CHUNK_BYTES, offset))
        return sha256.hexdigest()

    same_size = in_doubt((s for s in shards if s.size and s.format != "files"), lambda s: (s.format, s.size))
    with ThreadPoolExecutor(REQUESTS) as pool:
        heads = pool.map(lambda s: hashlib.sha256(store(s.root).read_at(s.name, 1 << 16, 0)).digest(), same_size)
        head_of = {s.uri: head for s, head in zip(same_size, heads, strict=True)}
        doubtful = {s.uri: s for s in in_doubt(same_size, lambda s: (s.format, s.size, head_of[s.uri])) if "://" in s.root}
        found = {s.uri: s.sha256 for s in known if s.uri in doubtful and s.sha256 and s.version == doubtful[s.uri].version}
        missing = [s for s in doubtful.values() if s.uri not in found]
        total, done = sum(s.size for s in missing), 0
        for shard, sha256 in zip(missing, pool.map(digest, missing), strict=True):
            found[shard.uri] = sha256
            done += shard.size
            progress(done, total)
    return [replace(shard, sha256=found.get(shard.uri, "")) for shard in shards]


def _interleave(listed: list[tuple[float, list[PlannedShard]]]) -> list[PlannedShard]:
    """Any prefix of the plan holds the sources in proportion to their weights (as far as they reach)."""
    keyed = [((i + 0.5) / weight, s, shard) for s, (weight, shards) in enumerate(listed) for i, shard in enumerate(shards)]
    return [shard for _, _, shard in sorted(keyed, key=lambda item: item[:2])]


def split_giant(shard: PlannedShard, max_samples: int, storage: Storage) -> list[PlannedShard]:
    """Parts of at most about `max_samples` samples, cut where a new key begins. Archives with interleaved keys stay whole.

    Only shards of at least 4 KiB a sample are opened. Parquet files on S3 stay whole: every part would fetch all of its file.
    """
    remote = "://" in shard.root
    if shard.size < max_samples * BYTES_PER_SAMPLE_AT_LEAST or shard.format == "files":
        return [shard]
    if shard.format == "parquet":
        if remote:
            return [shard]
        try:
            bounds = list(range(0, pq.ParquetFile(shard.uri).metadata.num_rows, max_samples))
        except pa.ArrowException:  # the reader says what is wrong with it
            return [shard]
    elif remote:
        bounds = _remote_tar_bounds(shard, max_samples, storage)
    else:
        descriptor = os.open(shard.uri, os.O_RDONLY)
        try:
            index = index_tar(functools.partial(os.pread, descriptor), os.fstat(descriptor).st_size)
            bounds = _tar_bounds(index.members, max_samples)
        finally:
            os.close(descriptor)
    if len(bounds) < 2:
        return [shard]
    bounds[0] = 0
    stops = [*bounds[1:], -1]
    return [
        replace(shard, id=f"{shard.id}-{part:04d}", start=start, stop=stop)
        for part, (start, stop) in enumerate(zip(bounds, stops, strict=True))
    ]


def _remote_tar_bounds(shard: PlannedShard, max_samples: int, storage: Storage) -> list[int]:
    """As `_tar_bounds`. Where members are small, its index costs reading most of the archive: only one whose head tells of
    more than `max_samples` samples is indexed."""
    read_at = _windows(storage, shard.name)
    head = index_tar(read_at, shard.size, stop=HEAD_BYTES).members
    if not head or len({_key(m) for m in head}) * shard.size < max_samples * (head[-1].offset + head[-1].size):
        return []
    return _tar_bounds(index_tar(read_at, shard.size).members, max_samples)


def _windows(storage: Storage, name: str) -> ReadAt:
    """Reads from a window of the object: a request takes as long as a few megabytes, and headers lie close together in
    archives of small members. What lies between windows is not fetched."""
    held, begin, length = b"", 0, HEAD_BYTES

    def read_at(size: int, offset: int) -> bytes:
        nonlocal held, begin, length
        if not begin <= offset <= offset + size <= begin + len(held):
            held, begin = storage.read_at(name, max(size, length), offset), offset
            length = min(2 * length, CHUNK_BYTES)
        return held[offset - begin : offset - begin + size]

    return read_at


def _key(member: Member) -> str:
    return member.name.rpartition(".")[0]


def _tar_bounds(members: list[Member], max_samples: int) -> list[int]:
    """Header offsets at which parts begin; empty when a key's members do not lie together."""
    starts: list[int] = []
    keys: list[str] = []
    for member in members:
        key = _key(member)
        # Captions KEY.NAME.txt stay with their image, before or after it.
        if keys and f"{key}.".startswith(f"{keys[-1]}."):
            continue
        if keys and keys[-1].startswith(f"{key}."):
            keys[-1] = key
            continue
        keys.append(key)
        starts.append(member.start)
    return starts[::max_samples] if len(set(keys)) == len(keys) else []


def plan_table(plan: Sequence[PlannedShard]) -> pa.Table:
    rows = [asdict(shard) for shard in plan]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def read_plan(data: bytes) -> list[PlannedShard]:
    """The inverse of writing `plan_table`."""
    return [PlannedShard(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()]
