"""Training whose checkpoints go to S3, while S3 is down and while the trainer dies: real processes, a real server."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from forked import Program
from s3_support import BUCKET, FaultyProxy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from small_run import as_torchrun, run_workers, small_recipe, start_workers

from fluid_core.training.checkpoint import list_checkpoints
from fluid_core.training.metrics import read_metrics
from fluid_core.training.remote import RemoteCheckpoints, fetch_newest

_SHORT_PAUSES = """
import fluid_core.data.storage as storage, fluid_core.training.remote as remote
storage.FIRST_PAUSE_SECONDS = 0.01
remote.FIRST_PAUSE_SECONDS = 0.2
"""


def test_s3_is_down_while_a_run_trains_to_its_end(proxy: FaultyProxy, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/down"
    recipe = small_recipe(tmp_path, workers=1, zero_stage=1, keep_last=2, checkpoint_path=uri)
    proxy.fault = lambda method, path: "503"
    (worker,) = start_workers(recipe, _SHORT_PAUSES)
    deadline = time.monotonic() + 400
    while len(read_metrics(recipe.training_dir / "metrics.jsonl")) < 6 and worker.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # All steps are done and S3 has not answered once: the end of the run waits. It does answer from now on.
    while len(proxy.seen) <= 6 and worker.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert worker.poll() is None
    proxy.fault = lambda method, path: None
    status, out = worker.end()
    assert status == 0, out
    assert "checkpoints could not be copied" in out and "again after" in out
    notices = (recipe.training_dir / "notices.txt").read_text()
    assert f"they are safe in {recipe.training_dir / 'checkpoints'}" in notices
    remote = RemoteCheckpoints(uri)
    assert [(c.step, remote.problem(c)) for c in remote.list()] == [(4, None), (6, None)]


_DIES_BEFORE_THE_MARKER_OF_STEP_4 = (
    _SHORT_PAUSES
    + """
put = storage.S3Storage.put_bytes
def die(self, data, name, overwrite):
    if name == "step_00000004/_COMPLETE":
        os._exit(9)
    return put(self, data, name, overwrite)
storage.S3Storage.put_bytes = die
"""
)


def test_killed_between_the_last_file_and_the_marker(proxy: FaultyProxy, repository: Path, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/killed"
    recipe = small_recipe(tmp_path, workers=1, max_steps=4, checkpoint_path=uri)
    run_workers(recipe, _DIES_BEFORE_THE_MARKER_OF_STEP_4, ok=False)
    remote, root = RemoteCheckpoints(uri), recipe.training_dir / "checkpoints"
    assert [c.step for c in list_checkpoints(root) if c.complete] == [2, 4]
    partial = next(c for c in remote.list() if c.step == 4)
    assert not partial.complete and {"rank_00000.safetensors", "state.json"} <= partial.sizes.keys()
    fetch_newest(remote, tmp_path / "elsewhere", print)
    assert 4 not in [c.step for c in list_checkpoints(tmp_path / "elsewhere")]
    # On the same machine the next start completes the copy.
    run_workers(recipe, _SHORT_PAUSES)
    assert [(c.step, remote.problem(c)) for c in remote.list()] == [(2, None), (4, None)]

    # Another machine, which has nothing but the recipe and S3: the driver fetches, Ray's workers go on from there.
    shutil.rmtree(recipe.training_dir)
    config = tmp_path / "recipe.yaml"
    without_ray = as_torchrun()
    command = [str(repository / "pipelines" / "pretrain.py"), "--config", str(config)]
    status, out = Program(command, tmp_path / "refused.log", without_ray, repository).end()
    assert status == 2 and f"{uri} holds a run of another recipe" in out, out
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command += ["--resume", "--set", "training.max_steps=6"]
    status, out = Program(command, tmp_path / "resumed.log", environment, repository).end()
    assert status == 0 and f"fetched {uri}/step_00000004" in out, out
    assert [line["step"] for line in read_metrics(recipe.training_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_metrics(recipe.training_dir / "validation.jsonl")] == [3, 4, 6]
    assert [(c.step, remote.problem(c)) for c in remote.list()] == [(2, None), (4, None), (6, None)]
    second = json.loads((recipe.training_dir / "run.json").read_text())
    assert second["checkpoints"] == uri

    # A third machine, without Ray: the newest checkpoint is of this very recipe, and of the second one's run in MLflow.
    shutil.rmtree(recipe.training_dir)
    command.insert(command.index("--resume") + 1, "same")
    status, out = Program(command, tmp_path / "third.log", without_ray, repository).end()
    assert status == 0 and f"fetched {uri}/step_00000006" in out, out
    assert [line["step"] for line in read_metrics(recipe.training_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    third = json.loads((recipe.training_dir / "run.json").read_text())
    assert third["tracking_run_id"] == second["tracking_run_id"]
