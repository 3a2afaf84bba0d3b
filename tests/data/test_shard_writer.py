import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from fluid_core.data.reader import read_tar
from fluid_core.data.samples import RawSample
from fluid_core.data.shard_writer import require_disk, write_shards


def sample(key: str, colour: str = "red") -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return {
        "__key__": key,
        "image_bytes": buffer.getvalue(),
        "extension": "png",
        "caption": f"a {colour} tile, “quoted”",
        "metadata": {"source": "test", "spec": {"colour": colour}},
    }


def digests(paths) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_same_samples_same_bytes(tmp_path):
    samples = [sample(f"s{i:03d}") for i in range(7)]
    first = write_shards(iter(samples), tmp_path / "a", 3)
    second = write_shards(iter(samples), tmp_path / "b", 3)
    assert [path.name for path in first] == ["00000.tar", "00001.tar", "00002.tar"]
    assert digests(first) == digests(second)
    with tarfile.open(first[0]) as tar:
        assert {member.mtime for member in tar} == {0}


def test_reads_back_with_the_project_reader(tmp_path):
    (path,) = write_shards([sample("one"), sample("two", "blue")], tmp_path, 8)
    read = list(read_tar(path))
    assert all(isinstance(item, RawSample) for item in read)
    assert [item.key for item in read] == ["one", "two"]
    assert read[1].captions == ["a blue tile, “quoted”"]
    assert read[1].metadata == {"source": "test", "spec": {"colour": "blue"}}


def test_shards_of_a_longer_run_are_removed(tmp_path):
    write_shards([sample(f"s{i}") for i in range(5)], tmp_path, 1)
    (tmp_path / "00009.tar.partial").write_bytes(b"left by a kill")
    write_shards([sample("s0")], tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_keys_that_readers_would_split_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="dot or a slash"):
        write_shards([sample(key)], tmp_path, 8)


def test_repeated_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_shards([sample("a"), sample("a")], tmp_path, 1)


def test_too_little_disk_is_said_before_work(tmp_path):
    with pytest.raises(ValueError, match="MiB free, about"):
        require_disk(tmp_path, 1 << 60)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot create"):
        require_disk(blocked / "inside", 1)


def test_metadata_is_json(tmp_path):
    (path,) = write_shards([sample("one")], tmp_path, 8)
    with tarfile.open(path) as tar:
        file = tar.extractfile("one.json")
        assert file is not None
        assert json.loads(file.read())["source"] == "test"
