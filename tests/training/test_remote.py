"""Checkpoints on a real S3 server: copied behind the training's back, found again, thinned out."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_support import READER_KEY, READER_SECRET
from small_run import write_checkpoint

from fluid_core.cli import main
from fluid_core.data import storage as storage_module
from fluid_core.data.storage import AccessError, open_storage
from fluid_core.training import remote as module
from fluid_core.training.checkpoint import list_checkpoints, pin
from fluid_core.training.metrics import read_metrics, write_metrics
from fluid_core.training.remote import RemoteCheckpoints, Uploader, WriterLease, fetch_newest
from fluid_core.workflow.stage import write_json_atomic


def steps(remote: RemoteCheckpoints) -> list[int]:
    return [c.step for c in remote.list() if c.complete]


def test_s3_follows_the_local_folder_and_keeps_what_is_to_be_kept(s3: str, tmp_path: Path) -> None:
    remote = RemoteCheckpoints(f"{s3}/follow")
    write_checkpoint(tmp_path, 10)
    pin(write_checkpoint(tmp_path, 20))
    uploader = Uploader(tmp_path, remote, keep_last=2, keep_every=50)
    assert uploader.finish(300) and steps(remote) == [10, 20] and remote.list()[1].pinned
    for step in (30, 50, 60, 70):
        write_checkpoint(tmp_path, step)
        uploader.notify()
    assert uploader.finish(300)
    assert steps(remote) == [20, 50, 60, 70], "the pinned one, every 50th, and the last two"
    assert all(remote.problem(c) is None for c in remote.list())
    # What the local folder loses stays; a pin that comes later follows.
    for c in list_checkpoints(tmp_path)[:-1]:
        shutil.rmtree(c.path)
    pin(list_checkpoints(tmp_path)[-1])
    uploader.notify()
    assert uploader.finish(300)
    assert [(c.step, c.pinned) for c in remote.list()] == [(20, True), (50, False), (60, False), (70, True)]


def test_a_marker_lost_between_the_files_and_it(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, root = RemoteCheckpoints(f"{s3}/lost"), tmp_path / "here"
    remote.push(write_checkpoint(root, 2))
    remote.push(write_checkpoint(root, 4))
    open_storage(remote.uri).delete("step_00000004/_COMPLETE")
    said: list[str] = []
    fetch_newest(remote, tmp_path / "elsewhere", said.append)
    assert [c.step for c in list_checkpoints(tmp_path / "elsewhere")] == [2]
    assert said == [f"passing over {remote.uri}/step_00000004: not complete", f"fetched {remote.uri}/step_00000002"]
    # Where the local folder is still there the copy is made complete; without it the parts are removed.
    assert Uploader(root, remote, 3, None).finish(300) and steps(remote) == [2, 4]
    open_storage(remote.uri).delete("step_00000004/_COMPLETE")
    assert Uploader(tmp_path / "elsewhere", remote, 3, None).finish(300) and [c.step for c in remote.list()] == [2]


def test_what_is_damaged_on_s3_is_passed_over_and_replaced(s3: str, tmp_path: Path) -> None:
    remote, root = RemoteCheckpoints(f"{s3}/damaged"), tmp_path / "here"
    for step in (2, 4, 6):
        remote.push(write_checkpoint(root, step))
    shard = (root / "step_00000006" / "rank_00001.safetensors").read_bytes()
    open_storage(remote.uri).put_bytes(shard[:-1] + b"?", "step_00000006/rank_00001.safetensors", overwrite=True)
    open_storage(remote.uri).delete("step_00000004/rank_00000.safetensors")
    assert "wrong checksum" in (remote.problem(remote.list()[2]) or "")
    said: list[str] = []
    fetch_newest(remote, tmp_path / "elsewhere", said.append, writer=True)
    assert "rank_00001.safetensors: wrong checksum" in said[0] and "rank_00000.safetensors: missing" in said[1]
    (found,) = list_checkpoints(tmp_path / "elsewhere")
    assert found.step == 2 and found.problem() is None and not list((tmp_path / "elsewhere").glob(".*"))
    # A local one that is whole is as good or better: nothing is fetched. And it mends S3.
    said.clear()
    fetch_newest(remote, root, said.append, writer=True)
    assert not said
    assert Uploader(root, remote, 3, None).finish(300) and steps(remote) == [2, 4, 6]
    assert all(remote.problem(c) is None for c in remote.list())


def test_a_reader_passes_over_what_is_damaged_and_leaves_it_alone(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `fluid export s3://...` and a promotion do, here with keys that may only read."""
    uri, root = f"{s3}/read", tmp_path / "here"
    remote = RemoteCheckpoints(uri)
    for step in (2, 4, 6):
        remote.push(write_checkpoint(root, step))
    storage = open_storage(uri)
    storage.put_bytes((root / "step_00000002" / "state.json").read_bytes(), "step_00000006/state.json", overwrite=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    reader = RemoteCheckpoints(uri)
    with pytest.raises(AccessError):
        reader.pin(2)
    said: list[str] = []
    # The files of step 4 go away between the listing and the download, as when a run replaces it.
    listed = reader.list()
    monkeypatch.setattr(reader, "list", lambda: listed)
    storage.delete("step_00000004/rank_00000.safetensors")
    fetch_newest(reader, tmp_path / "elsewhere", said.append)
    assert [c.step for c in list_checkpoints(tmp_path / "elsewhere")] == [2]
    assert [line.partition(": ")[0] for line in said[:2]] == [
        f"passing over {uri}/step_0000000{step} for the one before" for step in (6, 4)
    ]
    assert said[2] == f"fetched {uri}/step_00000002"
    assert steps(remote) == [2, 4, 6], "every marker is still there"


def test_a_local_file_that_rotted_is_not_copied(s3: str, tmp_path: Path) -> None:
    remote = RemoteCheckpoints(f"{s3}/rotten")
    write_checkpoint(tmp_path, 2)
    bad = write_checkpoint(tmp_path, 4).path / "rank_00000.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1] + b"?")
    said: list[str] = []
    assert Uploader(tmp_path, remote, 3, None, said.append).finish(300)
    assert steps(remote) == [2] and len(said) == 1 and "wrong checksum" in said[0]


def test_lines_of_metrics_are_on_s3_before_the_checkpoint_is(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, here, elsewhere = f"{s3}/history", tmp_path / "here", tmp_path / "elsewhere"
    remote = RemoteCheckpoints(uri)
    write_checkpoint(here / "checkpoints", 2)
    write_metrics(here / "metrics.jsonl", [{"step": step, "loss": step / 3} for step in (1, 2, 3)])
    (here / "validation.jsonl").write_text('{"step": 2}\n{"ste')  # killed while it wrote
    said: list[str] = []
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.05)
    with monkeypatch.context() as broken:
        broken.setattr(RemoteCheckpoints, "push", lambda *_: 1 / 0)  # the process might as well have died here
        uploader = Uploader(here / "checkpoints", remote, 3, None, said.append)
        _until(lambda: said)
        assert not steps(remote) and open_storage(uri).read_or_none("metrics.jsonl")
    assert uploader.finish(300) and steps(remote) == [2]
    elsewhere.mkdir()
    remote.fetch_history(elsewhere)
    assert read_metrics(elsewhere / "metrics.jsonl") == read_metrics(here / "metrics.jsonl")
    assert read_metrics(elsewhere / "validation.jsonl") == [{"step": 2}]
    # The first machine comes back after the run went on elsewhere: it gets what it lacks, and its own lines stay.
    write_metrics(here / "metrics.jsonl", [{"step": 1, "loss": 7.0}])
    remote.fetch_history(here)
    assert read_metrics(here / "metrics.jsonl") == [{"step": 1, "loss": 7.0}, *read_metrics(elsewhere / "metrics.jsonl")[1:]]
    # Where nothing is missing the file is left alone: a run may have it open.
    before = (here / "metrics.jsonl").stat()
    remote.fetch_history(here)
    assert (here / "metrics.jsonl").stat() == before
    remote.remove_history()
    assert [item.name for item in open_storage(uri).list() if not item.name.startswith("step_")] == []


def test_a_roll_back_is_on_s3_before_the_next_checkpoint_is(s3: str, tmp_path: Path) -> None:
    uri, here, elsewhere = f"{s3}/roll", tmp_path / "here", tmp_path / "elsewhere"
    remote = RemoteCheckpoints(uri)
    write_checkpoint(here / "checkpoints", 2)
    uploader = Uploader(here / "checkpoints", remote, 3, None)
    assert uploader.finish(300) and open_storage(uri).read_or_none("rollback.json") is None
    first, second = ({"step": 2, "samples": samples, "times": times} for samples, times in ((60, 1), (90, 2)))
    for rollback in (first, second):
        write_json_atomic(here / "rollback.json", rollback)
        uploader.notify()
        assert uploader.finish(300)
        elsewhere.mkdir(exist_ok=True)
        remote.fetch_history(elsewhere)
        assert json.loads((elsewhere / "rollback.json").read_text()) == rollback
    # The one that is here may be the later one: the machine was killed before it reached S3.
    later = second | {"samples": 120, "times": 3}
    write_json_atomic(elsewhere / "rollback.json", later)
    remote.fetch_history(elsewhere)
    assert json.loads((elsewhere / "rollback.json").read_text()) == later
    remote.remove_history()
    assert open_storage(uri).read_or_none("rollback.json") is None


def _until(holds: Callable[[], Any]) -> None:
    """Wait for something that another thread does, however busy the machine is."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_run_writes_under_a_prefix(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 20.0)
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 3.0)
    uri = f"{s3}/leased"
    storage, said = open_storage(uri), []

    def note(**changes: Any) -> None:
        values = {"host": "elsewhere", "pid": 1, "token": "another", "alive": time.time(), **changes}
        storage.put_bytes(json.dumps(values).encode(), "_WRITER", overwrite=True)

    def alive() -> float:
        return float(json.loads(storage.read_or_none("_WRITER") or b"{}")["alive"])

    with WriterLease(uri, said.append):
        first = alive()
        _until(lambda: alive() > first)  # signs of life
        with pytest.raises(ValueError, match=f"a run on {socket.gethostname()} .*choose another training.checkpoint_path"):
            WriterLease(uri, said.append).__enter__()
    assert storage.read_or_none("_WRITER") is None

    note()
    with pytest.raises(ValueError, match="a run on elsewhere"):
        WriterLease(uri, said.append).__enter__()
    note(alive=time.time() - 21)  # no sign of life for too long
    with WriterLease(uri, said.append):
        assert not said
        note()
        _until(lambda: said)  # told once that another has it, which is then left alone
    assert len(said) == 1 and "a run on elsewhere" in said[0] and b"elsewhere" in (storage.read_or_none("_WRITER") or b"")

    # The machine's own dead process, and two who find it so at once.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    note(host=socket.gethostname(), pid=gone.pid)
    together, refused = threading.Barrier(2), threading.Event()

    def attempt(_: int) -> bool:
        together.wait()
        try:
            with WriterLease(uri, said.append):
                refused.wait(60)
        except ValueError:
            refused.set()
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, range(2))) == [False, True]


def test_a_store_that_is_away_is_asked_again(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.05)
    said: list[str] = []
    write_checkpoint(tmp_path, 2)
    with monkeypatch.context() as away:
        away.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        uploader = Uploader(tmp_path, RemoteCheckpoints(f"{s3}/away"), 3, None, said.append)
        _until(lambda: said)
        assert not uploader.finish(0.1)
        assert "refuses access" in said[0] and f"they are safe in {tmp_path}" in said[0]
    uploader._remote = RemoteCheckpoints(f"{s3}/away")  # renewed credentials: a process reads them once
    assert uploader.finish(300) and "again after" in said[-1] and steps(RemoteCheckpoints(f"{s3}/away")) == [2]


def test_files_too_large_for_one_request_go_in_parts(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "LARGEST_PUT_BYTES", 1 << 20)
    monkeypatch.setattr(storage_module, "PART_BYTES", 5 << 20)
    store = open_storage(f"{s3}/parts")
    data = torch.arange(3_000_000, dtype=torch.int32).numpy().tobytes()
    (tmp_path / "large").write_bytes(data)
    assert store.put_file(tmp_path / "large", "large", overwrite=True)
    assert store.fetch("large", tmp_path / "down").read_bytes() == data
    (tmp_path / "large").write_bytes(data[::-1])
    assert not store.put_file(tmp_path / "large", "large", overwrite=False)
    assert store.fetch("large", tmp_path / "down").read_bytes() == data


def test_commands_see_them(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, run = f"{s3}/commands", tmp_path / "run"
    remote = RemoteCheckpoints(uri)
    remote.push(write_checkpoint(run / "checkpoints", 2))
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    write_checkpoint(run / "checkpoints", 4)
    write_json_atomic(run / "run.json", {"checkpoints": uri})

    def call(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        with pytest.raises(SystemExit) as end:
            main(["checkpoints", *arguments, "--json"])
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    assert call(uri, "--pin", "2", "--verify") == (
        0,
        [
            {
                "step": 2, "complete": True, "world_size": 2, "bytes": remote.list()[0].bytes, "pinned": True,
                "path": f"{uri}/step_00000002", "problem": None,
            }
        ],
    )  # fmt: skip
    code, rows = call(str(run))
    assert code == 0 and [row["path"] for row in rows] == [f"{uri}/step_00000002", str(run / "checkpoints" / "step_00000004")]
    open_storage(uri).delete("step_00000002/rank_00000.safetensors")
    code, rows = call(uri, "--verify")
    assert code == 1 and "rank_00000.safetensors: no bytes" in rows[0]["problem"]
