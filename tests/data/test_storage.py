"""Storage on a local disk; S3 is in tests/faults/test_encode_s3.py."""

import shutil
import threading

import pytest

from fluid_core.data.storage import LocalStorage, open_storage


def test_writes_are_whole_and_can_refuse(tmp_path):
    store = LocalStorage(str(tmp_path / "root"))
    assert store.put_bytes(b"one", "a/b", overwrite=False)
    assert not store.put_bytes(b"two", "a/b", overwrite=False) and store.read_or_none("a/b") == b"one"
    (tmp_path / "file").write_bytes(b"three")
    assert not store.put_file(tmp_path / "file", "a/b", overwrite=False)
    assert store.put_file(tmp_path / "file", "a/b", overwrite=True) and store.read_or_none("a/b") == b"three"
    assert [(o.name, o.size) for o in store.list("a")] == [("a/b", 5)]
    assert store.size_or_none("a/b") == 5 and store.size_or_none("gone") is None and store.read_or_none("gone") is None
    store.delete("a/b")
    store.delete("a/b")
    store.clean_scratch()
    assert not (tmp_path / "root/_tmp").exists()


def test_only_one_of_many_writers_wins(tmp_path):
    store = LocalStorage(str(tmp_path))
    won: list[bytes] = []

    def write(data: bytes) -> None:
        if store.put_bytes(data, "x", overwrite=False):
            won.append(data)

    threads = [threading.Thread(target=write, args=(bytes([i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.read_or_none("x") == won[0]


def test_a_scratch_folder_that_vanishes_is_made_again(tmp_path, monkeypatch):
    store = LocalStorage(str(tmp_path))
    real, times = store._publish, []

    def publish(temporary, target, overwrite):
        times.append(1)
        if len(times) == 1:
            shutil.rmtree(tmp_path / "_tmp")  # what another encoder does at its end
        return real(temporary, target, overwrite)

    monkeypatch.setattr(store, "_publish", publish)
    assert store.put_bytes(b"x", "x", overwrite=False) and len(times) == 2


def test_other_schemes_are_refused():
    with pytest.raises(ValueError, match="only local folders and s3"):
        open_storage("gs://bucket")
