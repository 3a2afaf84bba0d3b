"""The plan: the same shards in the same order with the same ids, duplicates refused, giants cut."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoding_support import make_shards, sample_members, write_tar

from fluid_core.data.plan import PlannedShard, make_plan, parse_source, plan_table, read_plan
from fluid_core.data.reader import read_shard
from fluid_core.data.samples import RawSample


def test_ids_depend_on_content_alone(tmp_path):
    make_shards(tmp_path / "a", 2, 3)
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    first, second = make_plan([str(tmp_path / "a")]), make_plan([str(tmp_path / "elsewhere/*.tar")])
    assert [s.id for s in first] == [s.id for s in second] and len({s.id for s in first}) == 2
    assert make_plan([str(tmp_path / "a/00001.tar")])[0].id == first[1].id


def test_weights_interleave(tmp_path):
    make_shards(tmp_path / "a", 4, 1)
    make_shards(tmp_path / "b", 4, 1, first=100)
    order = ["ab"["/b/" in shard.uri] for shard in make_plan([f"2::{tmp_path}/a", f"{tmp_path}/b"])]
    assert "".join(order) == "abaababb"
    assert {s.weight for s in make_plan([f"2::{tmp_path}/a"])} == {2.0}


@pytest.mark.parametrize("source", ["0::x", "-1::x", "many::x"])
def test_wrong_weights(source):
    with pytest.raises(ValueError, match="positive number"):
        parse_source(source)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.md").write_text("x")
    for source in ("gone", "gone.tar", "empty", "notes", "notes/*.tar"):
        with pytest.raises(ValueError, match=r"does not exist|matches no"):
            make_plan([str(tmp_path / source)])
    with pytest.raises(ValueError, match="no sources"):
        make_plan([])
    with pytest.raises(ValueError, match="only local folders and s3"):
        make_plan(["gs://bucket/x"])


def test_same_bytes_twice_are_one_shard(tmp_path):
    make_shards(tmp_path / "a", 2, 2)
    shutil.copy(tmp_path / "a/00000.tar", tmp_path / "a/zzz.tar")
    plan = make_plan([str(tmp_path / "a"), str(tmp_path / "a/00001.tar")])
    refused = [s for s in plan if s.duplicate_of]
    assert len(plan) == 4 and len(refused) == 2 and len({s.id for s in plan if not s.duplicate_of}) == 2


def test_known_files_are_not_hashed_again(tmp_path):
    make_shards(tmp_path / "a", 2, 2)
    hashed: list[int] = []
    plan = make_plan([str(tmp_path / "a")], progress=lambda done, total: hashed.append(done))
    assert len(hashed) == 2
    again = make_plan([str(tmp_path / "a")], known=plan, progress=lambda done, total: hashed.append(done))
    assert again == plan and len(hashed) == 2
    write_tar(tmp_path / "a/00000.tar", sample_members("new", 9))
    assert make_plan([str(tmp_path / "a")], known=plan)[0].id != plan[0].id


def test_plan_file_round_trip(tmp_path):
    make_shards(tmp_path / "a", 2, 2)
    plan = make_plan([str(tmp_path / "a")])
    sink = pa.BufferOutputStream()
    pq.write_table(plan_table(plan), sink)
    assert read_plan(sink.getvalue().to_pybytes()) == plan


def keys_of(shards: list[PlannedShard], scratch) -> list[str]:
    return [s.key for shard in shards for s in read_shard(shard, scratch) if isinstance(s, RawSample)]


def test_giants_are_cut_at_keys(tmp_path):
    keys = make_shards(tmp_path / "a", 1, 10)
    parts = make_plan([str(tmp_path / "a")], max_shard_samples=4)
    assert len(parts) == 3 and len({part.id for part in parts}) == 3
    assert keys_of(parts, tmp_path) == keys
    assert [len(list(read_shard(part, tmp_path))) for part in parts] == [4, 4, 2]
    members = [m for i in range(10) for m in sample_members(f"{i}", i)]
    write_tar(tmp_path / "mixed/0.tar", members[::2] + members[1::2])
    assert len(make_plan([str(tmp_path / "mixed")], max_shard_samples=4)) == 1
    (tmp_path / "p").mkdir()
    rows = {"key": [str(i) for i in range(10)], "jpg": [bytes([i]) * 5000 for i in range(10)], "caption": ["x"] * 10}
    pq.write_table(pa.table(rows), tmp_path / "p/0.parquet", compression="none", use_dictionary=False)
    parts = make_plan([str(tmp_path / "p")], max_shard_samples=4)
    assert len(parts) == 3 and keys_of(parts, tmp_path) == rows["key"]
    (tmp_path / "p/1.parquet").write_bytes(b"PAR1" + bytes(100_000))  # damaged: the reader's to tell
    assert len(make_plan([str(tmp_path / "p")], max_shard_samples=4)) == 4


def test_giants_with_dotted_keys_are_cut_too(tmp_path):
    image = sample_members("0", 0)[0][1]
    members = [
        member
        for i in range(6)
        for member in ((f"img.{i:04d}.alt.txt", b"first"), (f"img.{i:04d}.jpg", image), (f"img.{i:04d}.txt", b"x" * 6000))
    ]
    write_tar(tmp_path / "a/0.tar", members)
    parts = make_plan([str(tmp_path / "a")], max_shard_samples=2)
    assert len(parts) == 3 and keys_of(parts, tmp_path) == [f"img.{i:04d}" for i in range(6)]
    assert all(s.captions == ["x" * 6000, "first"] for part in parts for s in read_shard(part, tmp_path))  # type: ignore[union-attr]


def test_folders_of_images_are_told_by_their_content(tmp_path):
    image = sample_members("0", 0)[0][1]
    for name, data in (("a/x", image), ("a/copy", image), ("a/other", image[:-1] + b"!")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes(data)
        (tmp_path / name / "0.txt").write_text("a caption")
    make_shards(tmp_path / "a", 1, 1)  # a tar beside them hides none
    plan = {shard.name: shard for shard in make_plan([str(tmp_path / "a")])}
    assert set(plan) == {"00000.tar", "x", "copy", "other"}
    assert [bool(plan[name].duplicate_of) for name in ("copy", "other", "x")] == [False, False, True]
