"""Training through what goes wrong: workers, driver and disks die, one worker meets a NaN. Real processes, nothing mocked."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from forked import Program

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError
from small_run import run_workers, small_recipe, write_recipe

from fluid_core.entry import WorkFailed
from fluid_core.latents.reader import EncodedDataset
from fluid_core.training.checkpoint import latest_complete, list_checkpoints, load_ema_state
from fluid_core.training.loader import Loader, Slicing
from fluid_core.training.metrics import read_metrics
from fluid_core.training.order import DatasetOrder
from fluid_core.training.run import _failure, worker

_NAN_ON_RANK_1 = """
class Poisoned(TrainingLoop):
    def _step(self, batches, count, keys, clock):
        if self.rank == 1 and self.position in (0, 36, 48):
            batches[0].tokens[:] = float("nan")
        return super()._step(batches, count, keys, clock)
loop = Poisoned
"""


def test_nan_on_one_rank_is_skipped_by_all_and_two_in_a_row_roll_back(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, optimizer="muon", max_strikes=2, log_every=2)
    out = run_workers(recipe, _NAN_ON_RANK_1)
    lines = read_metrics(recipe.training_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # Step 1 is skipped alone. Steps 4 and 5 strike together: back to step 2's checkpoint, on with sample 60.
    assert lines[0]["loss"] is None and lines[0]["skipped"] == "loss is nan"
    binned = {name: value for name, value in lines[1].items() if name.startswith("loss_")}
    assert binned and None not in binned.values(), "the skipped step is in the binned losses"
    assert [line["samples"] for line in lines] == [12, 24, 72, 84, 96, 108]
    assert all(line["loss"] is not None for line in lines[1:])
    assert "rolled back to step 2; training goes on with sample 60" in out
    strikes = [json.loads(line) for line in (recipe.training_dir / "strikes.jsonl").read_text().splitlines()]
    assert [s["step"] for s in strikes] == [1, 4, 5] and all(len(s["keys"]) == 2 and len(s["keys"][1]) == 6 for s in strikes)
    newest = latest_complete(recipe.training_dir / "checkpoints", verify=True)
    assert newest is not None
    assert all(bool(torch.isfinite(values).all()) for _, values in load_ema_state(newest.path))


_DIES_AFTER_THE_ROLL_BACK = (
    _NAN_ON_RANK_1
    + """
write = TrainingLoop._write
def die(self, *args):
    write(self, *args)
    if self.position == 72:
        os._exit(9)
TrainingLoop._write = die
"""
)


def test_killed_between_a_roll_back_and_the_next_checkpoint_the_bad_samples_stay_skipped(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, max_strikes=2, checkpoint_every=2, max_steps=8)
    run_workers(recipe, _DIES_AFTER_THE_ROLL_BACK, ok=False)
    metrics = recipe.training_dir / "metrics.jsonl"
    assert [line["samples"] for line in read_metrics(metrics)] == [12, 24, 72]
    out = run_workers(recipe, _NAN_ON_RANK_1)
    assert "rolled back" not in out
    lines = read_metrics(metrics)
    assert [line["samples"] for line in lines] == [12, 24, 72, 84, 96, 108, 120, 132]
    assert "grad_norm_trunk" not in lines[0] and "grad_norm_trunk" in lines[1], "a skipped step has no norms of its parts"


_NAN_FROM_SAMPLE_36_ON = """
class Poisoned(TrainingLoop):
    def _step(self, batches, count, keys, clock):
        if self.position >= 36:
            batches[0].tokens[:] = float("nan")
        return super()._step(batches, count, keys, clock)
loop = Poisoned
"""


def test_a_run_that_only_rolls_back_ends(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, workers=1, zero_stage=0, max_strikes=1)
    out = run_workers(recipe, _NAN_FROM_SAMPLE_36_ON, ok=False)
    assert out.count("rolled back to step 2;") == 3
    assert "back to step 2 3 times, and bad again by step 3" in out and "training.spike_factor" in out


_DIES_WHILE_SAVING = """
import fluid_core.training.checkpoint as module
finish = module.Checkpointer._finish
def die(self, folder, step, state):
    if step == 4:
        import os
        os._exit(9)
    finish(self, folder, step, state)
module.Checkpointer._finish = die
"""
_DISK_FULL_ON_RANK_1 = """
import fluid_core.training.checkpoint as module
save = module.save_file
def full(pieces, path, metadata):
    if os.environ["RANK"] == "1" and "step_00000004" in str(path):
        raise OSError(28, "No space left on device")
    save(pieces, path, metadata=metadata)
module.save_file = full
"""


def test_killed_while_saving_and_a_full_disk(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    root = recipe.training_dir / "checkpoints"
    run_workers(recipe, _DIES_WHILE_SAVING, ok=False)
    assert [c.step for c in list_checkpoints(root)] == [2] and list(root.glob(".step_00000004.*"))
    out = run_workers(recipe, _DISK_FULL_ON_RANK_1, ok=False)
    assert "No space left on device" in out and "the newest complete checkpoint is of step 2" in out
    assert latest_complete(root, verify=True) == list_checkpoints(root)[-1]
    run_workers(recipe)
    ended = json.loads((recipe.training_dir / "result.json").read_text())
    run_workers(recipe)
    assert json.loads((recipe.training_dir / "result.json").read_text()) == ended and ended["metrics"], "nothing left to do"
    assert [c.step for c in list_checkpoints(root)] == [2, 4, 6] and not list(root.glob(".step_*"))
    assert [line["step"] for line in read_metrics(recipe.training_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


_ELSEWHERE_ON_RANK_1 = """
import fluid_core.training.checkpoint as checkpoints
checkpoints.SHARED_SECONDS = 0.2
class Elsewhere(TrainingLoop):
    def __init__(self, recipe, settings):
        if os.environ["RANK"] == "1":
            recipe.training.checkpoint_path = settings.run_dir + "/of_another_machine"
        super().__init__(recipe, settings)
loop = Elsewhere
"""


def test_workers_that_share_no_folder_are_told_before_the_first_step(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    out = run_workers(recipe, _ELSEWHERE_ON_RANK_1, ok=False)
    assert "worker 1 on" in out and "a folder that all machines share" in out
    assert not read_metrics(recipe.training_dir / "metrics.jsonl")


def test_a_worker_that_does_not_see_the_driver_s_folder_says_so_once(tmp_path: Path) -> None:
    """Ray starts it a second time; then it ends at once, and the driver finds no result."""
    settings = {"run_dir": str(tmp_path / "small"), "fingerprint": "f", "tracking_uri": "sqlite:///unused.db"}
    job = {"recipe": {}, "settings": settings, "directory": str(tmp_path / "nowhere"), "threads": torch.get_num_threads()}
    with pytest.raises(ValueError, match="set runs_dir to a folder that all machines share"):
        worker(job)
    worker(job)


_DELETES_A_SHARD = """
class Deleting(TrainingLoop):
    def _train(self):
        if self.rank == 0:
            os.rename({file!r}, {file!r} + ".away")
        return super()._train()
loop = Deleting
"""


def test_a_data_shard_deleted_while_training(tmp_path: Path) -> None:
    """The run ends with the file's name, after the last step that had all its samples; put back, no sample is left out."""
    # A shard is a row group is a shuffle window: what lies far ahead has not been read yet.
    recipe = small_recipe(tmp_path, {"rows": 96, "shards": 12}, max_steps=8, shuffle_window=8)
    data = EncodedDataset(recipe.encode.output)
    loader = Loader([(data, 1.0)], recipe.model, recipe.seed, Slicing(12, 0, 1, None), 8)
    expected = [hashlib.sha256(loader.batches(start)[0].key_hashes.numpy().tobytes()).hexdigest() for start in range(0, 96, 12)]
    order = DatasetOrder(data.row_groups, data.manifest.hash, recipe.seed, 8)
    shard = data.manifest.shards[order.windows(0)[-1].groups[0][0]].id
    file = f"{recipe.encode.output}/latents/{shard}.parquet"
    out = run_workers(recipe, _DELETES_A_SHARD.format(file=file), ok=False)
    assert f"{file} is missing" in out and "copy it again or encode again" in out
    metrics = recipe.training_dir / "metrics.jsonl"
    reached = [line["step"] for line in read_metrics(metrics)]
    assert reached == list(range(1, len(reached) + 1)) and len(reached) < 8
    os.rename(f"{file}.away", file)
    run_workers(recipe)
    assert [line["keys_sha256"] for line in read_metrics(metrics)] == expected


class _Driver(Program):
    """A started pipelines/pretrain.py."""

    def __init__(self, repository: Path, config: Path, *more: str):
        log = Path(tempfile.mkstemp(suffix=".log", dir=config.parent)[1])
        super().__init__([str(repository / "pipelines" / "pretrain.py"), "--config", str(config), *more], log, cwd=repository)

    def wait_for_step(self, metrics: Path, step: int) -> int:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            lines = read_metrics(metrics)
            if lines and lines[-1]["step"] >= step:
                return int(lines[-1]["step"])
            assert self.poll() is None, self.output()[-4000:]
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached: {self.output()[-4000:]}")


def _workers(run_dir: Path, data: Path) -> tuple[int, int] | None:
    """Process ids of ranks 0 and 1, once both are there: both read the data set, rank 0 holds the writer's lock."""
    readers, writers = set(), set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith(f"{data}/latents/"):
            readers.add(int(entry.parts[2]))
        elif target == str(run_dir / ".writer.lock"):
            writers.add(int(entry.parts[2]))
    if len(writers) != 1 or len(readers | writers) != 2:
        return None
    (rank0,) = writers
    (rank1,) = readers - writers
    return rank0, rank1


@pytest.fixture
def own_ray() -> Iterator[str]:
    """The address of a Ray that a test may damage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Unix socket paths are limited to 107 bytes, so not under pytest's own (long) temp folder.
    with tempfile.TemporaryDirectory(prefix="fluid-test-", ignore_cleanup_errors=True) as scratch:
        command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}", f"--temp-dir={scratch}"]
        command += ["--num-cpus=4", "--include-dashboard=false", "--object-store-memory=200000000"]
        head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield address
        # Nothing in it is to be kept, and to stop it in order takes Ray half a minute.
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()


_NODE = "import ray; ray.init(log_to_driver=False); print(ray.nodes()[0]['NodeID'])"


@pytest.mark.timeout(1500)
def test_a_run_survives_its_workers_its_driver_a_notice_of_preemption_and_a_stop(
    ray_session: str, own_ray: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", own_ray)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    # As often as Ray can be asked: the waiting is not what is tested.
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    config = write_recipe(
        tmp_path, max_steps=3000, checkpoint_every=10, log_every=10, validate_every=3000, keep_last=2, max_failures=12,
        watchdog_seconds=20,
    )  # fmt: skip
    run_dir = tmp_path / "runs" / "small"
    metrics, root = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    deadline = time.monotonic() + 300
    while (found := Program(["-c", _NODE], tmp_path / "node.log").end())[0]:
        assert time.monotonic() < deadline, found
    node = found[1].split()[-1]
    driver = _Driver(repository, config)
    driver.wait_for_step(metrics, 15)
    old: tuple[int, int] | None = None

    def workers() -> tuple[int, int]:
        """Ranks 0 and 1, once two new ones have taken the place of those that were asked for before."""
        nonlocal old
        deadline = time.monotonic() + 300
        while (found := _workers(run_dir, tmp_path / "data")) is None or (old and set(found) & set(old)):
            assert time.monotonic() < deadline, driver.output()[-4000:]
            time.sleep(0.2)
        old = found
        return found

    # kill -9 of a worker: Ray starts both again, and they go on from the newest complete checkpoint.
    os.kill(workers()[0], signal.SIGKILL)
    status, out = _Driver(repository, config).end()
    assert status == 2 and "another process is training" in out, out
    # A worker that stands still: the other one waits for it, its watchdog says so and ends it.
    stopped_worker = workers()[1]
    os.kill(stopped_worker, signal.SIGSTOP)
    deadline = time.monotonic() + 300
    while "watchdog: worker 0 made no step for 20 s" not in driver.output():
        assert time.monotonic() < deadline, driver.output()[-4000:]
        time.sleep(0.2)
    assert "loop.py" in (run_dir / "hang_rank_0.txt").read_text()
    reached = read_metrics(metrics)[-1]["step"]
    time.sleep(1)
    driver.wait_for_step(metrics, reached + 12)
    assert not Path(f"/proc/{stopped_worker}").exists(), "the stopped worker is not left behind"

    # kill -9 of the driver: the same command goes on where it is told to.
    workers()
    driver.kill()
    driver.wait()
    newest = latest_complete(root)
    assert newest is not None and newest.step >= 10
    status, out = _Driver(repository, config).end()
    assert status == 2 and "holds this very run" in out and "add --resume" in out, out
    driver = _Driver(repository, config, "--resume", "same", "--set", "training.checkpoint_every=100000")
    workers()
    reached = driver.wait_for_step(metrics, newest.step + 11)
    driver.wait_for_step(metrics, reached + 2)

    # The node is drained as a cloud drains a spot instance; long before the next checkpoint is due there is one.
    before = [c.step for c in list_checkpoints(root)]
    drain = ["drain-node", "--address", own_ray, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", "the spot instance is wanted back", "--deadline-remaining-seconds", "3600"]
    status, out = Program(["-m", "ray.scripts.scripts", *drain], tmp_path / "drain.log").end()
    assert status == 0, out
    deadline = time.monotonic() + 300
    while (saved := latest_complete(root, verify=True)) is None or saved.step in before:
        assert time.monotonic() < deadline and driver.poll() is None, driver.output()[-4000:]
        time.sleep(0.2)
    assert f"a node is about to be taken away: checkpoint of step {saved.step}" in (run_dir / "notices.txt").read_text()
    driver.wait_for_step(metrics, saved.step + 2)
    assert [c.step for c in list_checkpoints(root) if c.step not in before] == [saved.step], "one for one notice"

    # SIGTERM: the step is finished, a checkpoint saved, and the exit status says that it is not done.
    driver.send_signal(signal.SIGTERM)
    status, out = driver.end()
    assert status == 143 and "checkpoint saved; --resume goes on" in out, out
    stopped = latest_complete(root, verify=True)
    assert stopped is not None and read_metrics(metrics)[-1]["step"] == stopped.step < 3000

    # Another recipe under the same name is refused before anything starts; --resume takes the run over, in another Ray.
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    status, out = _Driver(repository, config, "--set", "training.learning_rate=2e-3").end()
    assert status == 2 and "add --resume" in out, out
    steps = stopped.step + 5
    status, out = _Driver(repository, config, "--set", f"training.max_steps={steps}", "--resume").end()
    assert status == 0, out
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, steps + 1))
    # A start that is refused leaves the record of the finished run.
    status, out = _Driver(repository, config, "--set", "training.learning_rate=2e-3").end()
    assert status == 2 and "add --resume" in out, out
    status, out = _Driver(repository, config, "--set", f"training.max_steps={steps}", "--resume").end()
    assert status == 0 and "already complete" in out, out


def test_what_a_restart_cannot_mend_is_not_tried_again(ray_session: str, repository: Path, tmp_path: Path) -> None:
    config = write_recipe(tmp_path, max_steps=3000, max_failures=5, workers=1, zero_stage=0)
    run_dir = tmp_path / "runs" / "small"
    # Not complete: every start of the workers passes over it and says so.
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    shard = tmp_path / "data" / "latents" / "shard001.parquet"
    shard.rename(tmp_path / "away")
    status, out = _Driver(repository, config, "--resume").end()
    assert status == 2 and "Traceback" not in out, out
    assert f"error: {shard} is missing" in out
    assert (run_dir / "notices.txt").read_text().count("passing over checkpoint step_00000002") == 1, "one start"


def test_a_lost_disk_or_worker_is_told_in_one_line_and_a_defect_keeps_its_traceback() -> None:
    gone, full = RuntimeError("connection closed by peer"), OSError(28, "No space left on device")
    for failures, said in (
        ({0: UserExceptionWithTraceback(gone, "..."), 1: UserExceptionWithTraceback(full, "...")}, "No space left on device"),
        ({0: UserExceptionWithTraceback(gone, "..."), 1: RayActorError()}, "a worker was lost"),
    ):
        failed = _failure(WorkerGroupError("...", failures), 2)
        assert isinstance(failed, WorkFailed) and said in str(failed) and "training.max_failures is 2" in str(failed)
    defect = WorkerGroupError("...", {0: UserExceptionWithTraceback(TypeError("ours"), "...")})
    assert _failure(defect, 2) is defect
