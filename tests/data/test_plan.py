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
