"""The tar reader: what is whole comes out, and every defect is reported, whatever bytes are hit."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluid_core.data.plan import make_plan
from fluid_core.data.reader import read_shard, read_tar
from fluid_core.data.samples import RawSample, Rejected


def write(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, prefix: str = "") -> list[tuple[str, bytes]]:
    return [
        m
        for i in range(count)
        for m in ((f"{prefix}{i:03d}.jpg", b"image %d" % i), (f"{prefix}{i:03d}.txt", b"caption %d" % i))
    ]


def read(path: Path, **options) -> tuple[list[str], dict[str, str]]:
    """(keys of the samples, {key: reason} of the rejected)."""
    found = list(read_tar(path, **options))
    return [s.key for s in found if isinstance(s, RawSample)], {r.key: r.reason for r in found if isinstance(r, Rejected)}


def test_keys_with_dots_and_folders_stay_apart(tmp_path):
    path = write(
        tmp_path / "a.tar", [("x/a.b0.jpg", b"1"), ("x/a.b0.txt", b"one"), ("x/a.b1.JPEG", b"2"), ("x/a.b1.txt", b"two")]
    )
    assert read(path) == (["x/a.b0", "x/a.b1"], {})


def test_several_captions_and_metadata(tmp_path):
    metadata = {"caption": "from json", "alt": ["other", "main"], "punsafe": 0.1}
    members = [
        ("k.webp", b"i"),
        ("k.recaption.txt", b" re \n caption "),
        ("k.txt", b"main"),
        ("k.json", json.dumps(metadata).encode()),
    ]
    path = write(tmp_path / "a.tar", members)
    (sample,) = read_tar(path, ("alt",))
    assert isinstance(sample, RawSample)
    assert sample.captions == ["main", "re caption", "other"]
    assert sample.metadata["punsafe"] == 0.1
    (plain,) = read_tar(write(tmp_path / "b.tar", [("k.png", b"i"), ("k.json", json.dumps(metadata).encode())]))
    assert isinstance(plain, RawSample) and plain.captions == ["from json"]


def test_interleaved_members_are_grouped(tmp_path):
    members = pairs(6)
    path = write(tmp_path / "a.tar", members[::2] + members[1::2])
    keys, rejected = read(path)
    assert len(keys) == 6 and not rejected
    assert [s.captions for s in read_tar(path) if isinstance(s, RawSample)][3] == ["caption 3"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    name = "ordner-ü/" + "long" * 60
    assert read(write(tmp_path / "a.tar", [(f"{name}.png", b"i"), (f"{name}.txt", b"t")], format)) == ([name], {})


def test_cut_inside_a_member(tmp_path):
    path = write(tmp_path / "a.tar", pairs(5))
    os.truncate(path, 512 * 4 * 3 + 512 + 3)  # in the data of 003.jpg
    assert read(path) == (["000", "001", "002"], {"003.jpg": "tar_truncated"})


def test_cut_at_a_header_boundary(tmp_path):
    path = write(tmp_path / "a.tar", pairs(5))
    os.truncate(path, 512 * 4 * 3)
    assert read(path) == (["000", "001", "002"], {"a.tar#tar_truncated": "tar_truncated"})


def test_cut_between_image_and_caption(tmp_path):
    path = write(tmp_path / "a.tar", pairs(3))
    os.truncate(path, 512 * 4 * 2 + 1024)
    assert read(path) == (["000", "001"], {"a.tar#tar_truncated": "tar_truncated", "002": "missing_caption"})


@pytest.mark.parametrize(
    "data, reason", [(b"", "empty_shard"), (b"<html>403 Forbidden</html>", "not_a_tar"), (b"<html>" * 4000, "not_a_tar")]
)
def test_no_tar_at_all(tmp_path, data, reason):
    (tmp_path / "a.tar").write_bytes(data)
    keys, rejected = read(tmp_path / "a.tar")
    assert keys == [] and list(rejected.values()) == [reason]


def test_bad_header_checksum_costs_one_member(tmp_path):
    path = write(tmp_path / "a.tar", pairs(4))
    data = bytearray(path.read_bytes())
    data[4 * 512 + 1] ^= 1  # a name's byte in the header of 001.jpg
    path.write_bytes(data)
    keys, rejected = read(path)
    assert keys == ["000", "002", "003"]
    assert rejected == {"a.tar#tar_bad_header": "tar_bad_header", "001": "caption_without_image"}


def test_duplicate_members_count_once(tmp_path):
    path = write(tmp_path / "a.tar", [*pairs(3), ("001.jpg", b"other"), ("001.txt", b"other")])
    keys, rejected = read(path)
    assert keys == ["000", "001", "002"] and rejected == {"001": "duplicate_member"}
    assert next(s for s in read_tar(path) if isinstance(s, RawSample) and s.key == "001").image == b"image 1"


def test_concatenated_archives_are_read_to_the_end(tmp_path):
    one, two = write(tmp_path / "1.tar", pairs(2, "a")), write(tmp_path / "2.tar", pairs(2, "b"))
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    assert read(tmp_path / "both.tar") == (["a000", "a001", "b000", "b001"], {})


def test_missing_and_bad_parts(tmp_path):
    members = [
        ("a.jpg", b"i"),
        ("b.txt", b"t"),
        ("c.jpg", b"i"),
        ("c.txt", b"\xff\xfe"),
        ("d.jpg", b"i"),
        ("d.txt", b"t"),
        ("d.json", b"{"),
    ]
    expected = {"a": "missing_caption", "b": "caption_without_image", "c": "caption_not_utf8", "d": "bad_metadata"}
    assert read(write(tmp_path / "a.tar", members)) == ([], expected)


def test_index_of_img2dataset_tells_what_the_tar_lacks(tmp_path):
    write(tmp_path / "00000.tar", pairs(3))
    rows = {"key": ["000", "001", "002", "003", "004"], "status": ["success"] * 4 + ["failed_to_download"]}
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    (shard,) = make_plan([str(tmp_path)])
    found = list(read_shard(shard, tmp_path))
    assert [r.key for r in found if isinstance(r, Rejected)] == ["003"]
    assert len(found) == 4


def test_parquet_with_bytes_and_with_paths(tmp_path):
    (tmp_path / "bytes").mkdir()
    rows = {"key": ["a", "b", "c"], "jpg": [b"1", b"2", None], "caption": ["one", "two", "x"], "punsafe": [0.1, 0.2, 0.3]}
    pq.write_table(pa.table(rows | {"status": ["success", "success", "failed"]}), tmp_path / "bytes/0.parquet")
    (shard,) = make_plan([str(tmp_path / "bytes")])
    first, second, third = read_shard(shard, tmp_path)
    assert isinstance(first, RawSample) and first.image == b"1" and first.metadata == {"punsafe": 0.1, "status": "success"}
    assert isinstance(second, RawSample) and second.captions == ["two"]
    assert third == Rejected("c", "failed_download", "failed")
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths/x.jpg").write_bytes(b"picture")
    pq.write_table(pa.table({"image_path": ["x.jpg", "gone.jpg"], "text": ["one", "two"]}), tmp_path / "paths/0.parquet")
    (shard,) = make_plan([str(tmp_path / "paths/*.parquet")])
    first, second = read_shard(shard, tmp_path)
    assert isinstance(first, RawSample) and first.image == b"picture"
    assert isinstance(second, Rejected) and second.reason == "missing_image"


def test_parquet_of_hugging_face_and_drifted_schema(tmp_path):
    images = pa.array([{"bytes": b"1", "path": "a.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": images, "text": ["one"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"picture": [b"1", b"2"], "text": ["one", "two"]}), tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_bytes(b"PAR1 no footer")
    shards = make_plan([str(tmp_path)])
    assert isinstance(next(read_shard(shards[0], tmp_path)), RawSample)
    assert [r.reason for r in read_shard(shards[1], tmp_path) if isinstance(r, Rejected)] == ["schema_drift"] * 2
    assert [r.reason for r in read_shard(shards[2], tmp_path) if isinstance(r, Rejected)] == ["not_parquet"]


def test_folders_of_files(tmp_path):
    for folder in ("00000", "00001"):
        (tmp_path / folder).mkdir()
        for name, data in pairs(2):
            (tmp_path / folder / name).write_bytes(data)
    (tmp_path / "00001/lost.txt").write_bytes(b"no image")
    rows = {"key": ["000", "001", "002", "lost"], "status": ["success"] * 4}
    pq.write_table(pa.table(rows), tmp_path / "00001.parquet")
    first, second = make_plan([str(tmp_path)])
    assert [s.key for s in read_shard(first, tmp_path)] == ["000", "001"]
    found = list(read_shard(second, tmp_path))
    assert [s.key for s in found] == ["lost", "000", "001", "002"]  # what the index lists is told once
    assert [s.reason for s in found if isinstance(s, Rejected)] == ["caption_without_image", "missing_member"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10239), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.one_of(st.none(), st.integers(0, 10240)),
)
def test_any_mutation_is_survived_and_no_loss_is_silent(tmp_path, changes, length):
    path = write(tmp_path / "m.tar", pairs(4))
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position] = value
    path.write_bytes(data[:length])
    found = list(read_tar(path))
    accounted = {s.key.removesuffix(".jpg").removesuffix(".txt") for s in found}
    lost = {f"{i:03d}" for i in range(4)} - accounted
    faults = [
        r
        for r in found
        if isinstance(r, Rejected) and r.reason in ("tar_bad_header", "tar_truncated", "not_a_tar", "empty_shard")
    ]
    assert not lost or faults
    keys = [s.key for s in found if isinstance(s, RawSample)]
    assert len(keys) == len(set(keys))


def test_half_a_surrogate_pair_is_bad_metadata(tmp_path):
    metadata = [b'{"caption": "half \\ud83d of a smile"}', b'{"caption": "a whole \\uD83D\\uDE00 smile"}']
    members = [m for i, text in enumerate(metadata) for m in ((f"{i}.jpg", b"x"), (f"{i}.json", text))]
    keys, rejected = read(write(tmp_path / "a.tar", members))
    assert keys == ["1"] and rejected == {"0": "bad_metadata"}


def test_parquet_rows_that_are_no_text_or_no_file(tmp_path):
    captions = pa.array([b"good", b"\xff\xfe", b"also good"]).cast(pa.binary()).view(pa.binary())
    text = pa.Array.from_buffers(pa.utf8(), 3, captions.buffers())
    pq.write_table(pa.table({"key": ["0", "1", "2"], "jpg": [b"x"] * 3, "caption": text}), tmp_path / "a.parquet")
    (shard,) = make_plan([str(tmp_path / "a.parquet")])
    found = list(read_shard(shard, tmp_path / "scratch"))
    assert [s.key for s in found if isinstance(s, RawSample)] == ["0", "2"]
    assert [r.reason for r in found if isinstance(r, Rejected)] == ["text_not_utf8"]

    paths = [str(tmp_path), "b" * 300, "http://example.org/x.jpg", "a.parquet/x.jpg", "nul\0.jpg"]
    pq.write_table(pa.table({"path": paths, "caption": ["x"] * len(paths)}), tmp_path / "b.parquet")
    (shard,) = make_plan([str(tmp_path / "b.parquet")])
    assert [r.reason for r in read_shard(shard, tmp_path / "scratch")] == ["missing_image"] * len(paths)  # type: ignore[union-attr]
