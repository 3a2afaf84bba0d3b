"""A tar reader that loses nothing in silence: every defect of the archive is reported beside what could still be read.

`index_tar` reads headers alone (512 bytes a member), so that samples can be grouped by key wherever their members lie in the
archive, and a giant archive can be cut into ranges. After a damaged header it looks for the next whole one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK = 512
_ZERO = bytes(BLOCK)
_SCAN_BYTES = 1 << 20
_REGULAR = {b"0", b"\0", b"7"}

ReadAt = Callable[[int, int], bytes]
"""(number of bytes, offset) -> those bytes, fewer at the end of the archive."""


@dataclass(frozen=True)
class Member:
    """A regular file: `offset` is where its data begins, `start` where its (first) header does."""

    name: str
    start: int
    offset: int
    size: int


@dataclass(frozen=True)
class TarFault:
    reason: str
    detail: str
    name: str = ""
    """The member that the fault cut, when its name could still be read."""


@dataclass
class TarIndex:
    members: list[Member] = field(default_factory=list)
    faults: list[TarFault] = field(default_factory=list)


def index_tar(read_at: ReadAt, size: int, start: int = 0, stop: int | None = None) -> TarIndex:
    """Index the archive of `size` bytes, or the members whose header begins in its byte range [start, stop); `start` is where
    a header begins.

    Faults: `empty_shard`, `not_a_tar`, `tar_bad_header`, `tar_truncated` (inside a member, or without the zero blocks that
    end an archive), `tar_link`.
    """
    index = TarIndex()
    if size == 0:
        index.faults.append(TarFault("empty_shard", "the file has no bytes"))
        return index
    whole = stop is None
    end = size if stop is None else min(stop, size)
    position, first_header, long_name, ended = start, None, None, False
    while position + BLOCK <= end:
        block = read_at(BLOCK, position)
        if block == _ZERO:
            ended, position = True, position + BLOCK
            continue
        header = _parse_header(block)
        if header is None:
            found = _next_header(read_at, position + BLOCK, end)
            if found is None and not index.members and not index.faults and position == 0:
                index.faults.append(TarFault("not_a_tar", f"starts with {block[:24]!r}"))
                return index
            index.faults.append(TarFault("tar_bad_header", f"at byte {position}, the next whole header at {found}"))
            first_header, long_name = None, None
            if found is None:
                return index
            position = found
            continue
        ended = False
        name, length, kind = header
        data = position + BLOCK
        if data + length > size:
            index.faults.append(
                TarFault("tar_truncated", f"ends {data + length - size} bytes before the member does", long_name or name)
            )
            return index
        if kind in (b"L", b"x"):
            first_header = position if first_header is None else first_header
            extended = _extended_name(kind, read_at(length, data))
            long_name = extended if extended is not None else long_name
        else:
            name = long_name or name
            if kind in _REGULAR and not name.endswith("/"):
                index.members.append(Member(name, position if first_header is None else first_header, data, length))
            elif kind in (b"1", b"2"):
                index.faults.append(TarFault("tar_link", "links are not followed", name))
            first_header, long_name = None, None
        position = data + -(-length // BLOCK) * BLOCK
    if whole and position == 0:
        index.faults.append(TarFault("not_a_tar", f"only {size} bytes"))
    elif whole and not ended:
        index.faults.append(TarFault("tar_truncated", "the archive has no end mark: members may be missing"))
    return index


def _parse_header(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, type) of a header block, or None when its checksum or its numbers are wrong."""
    stored = _number(block[148:156])
    if stored is None or stored != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    size = _number(block[124:136])
    if size is None or size < 0:
        return None
    name = block[:100].split(b"\0", 1)[0]
    # GNU archives put other things where ustar has the prefix of a long name.
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def _number(field_bytes: bytes) -> int | None:
    if field_bytes[0] in (0x80, 0xFF):  # base-256, for sizes over 8 GiB
        return int.from_bytes(field_bytes[1:], "big", signed=field_bytes[0] == 0xFF)
    text = field_bytes.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def _extended_name(kind: bytes, data: bytes) -> str | None:
    if kind == b"L":
        return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    while data:  # pax records: "LENGTH key=value\n"
        length_text, _, _ = data.partition(b" ")
        if not length_text.isdigit() or not 0 < int(length_text) <= len(data):
            return None
        key, _, value = data[len(length_text) + 1 : int(length_text) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[int(length_text) :]
    return None


def _next_header(read_at: ReadAt, position: int, end: int) -> int | None:
    """Where the next block with a right checksum begins; members start on block boundaries."""
    while position + BLOCK <= end:
        chunk = read_at(min(_SCAN_BYTES, end - position), position)
        for at in range(0, len(chunk) - BLOCK + 1, BLOCK):
            # A cheap test first: the type flag of a header, and not a block of zeros.
            plausible = chunk[at + 156 : at + 157] in (b"0", b"\0", b"L", b"x", b"5", b"g") and chunk[at : at + 1] != b"\0"
            if plausible and _parse_header(chunk[at : at + BLOCK]) is not None:
                return position + at
        position += len(chunk) // BLOCK * BLOCK
        if len(chunk) < BLOCK:
            return None
    return None


def plain_name(name: str) -> str:
    """A member's name as it may be stored and printed: bytes that are no UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").removeprefix("./")
