"""Training through what goes wrong: workers, driver and disks die, one worker meets a NaN. Real processes, nothing mocked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from small_run import run_workers, small_recipe, write_recipe

from fluid_core.training.checkpoint import latest_complete, list_checkpoints, load_ema_state
from fluid_core.training.metrics import read_metrics

_NAN_ON_RANK_1 = """
class Poisoned(TrainingLoop):
    def _step(self, batches, count, keys, clock):
        if self.rank == 1 and self.position in (0, 36, 48):
            batches[0].tokens[:] = float("nan")
        return super()._step(batches, count, keys, clock)
loop = Poisoned
"""


def test_nan_on_one_rank_is_skipped_by_all_and_two_in_a_row_roll_back(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, optimizer="muon", max_strikes=2)
    out = run_workers(recipe, _NAN_ON_RANK_1)
    lines = read_metrics(recipe.training_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # Step 1 is skipped alone. Steps 4 and 5 strike together: back to step 2's checkpoint, on with sample 60.
    assert lines[0]["loss"] is None and lines[0]["skipped"] == "loss is nan"
    assert [line["samples"] for line in lines] == [12, 24, 72, 84, 96, 108]
    assert all(line["loss"] is not None for line in lines[1:])
    assert "rolled back to step 2; training goes on with sample 60" in out
    strikes = [json.loads(line) for line in (recipe.training_dir / "strikes.jsonl").read_text().splitlines()]
    assert [s["step"] for s in strikes] == [1, 4, 5] and all(len(s["keys"]) == 2 and len(s["keys"][1]) == 6 for s in strikes)
    newest = latest_complete(recipe.training_dir / "checkpoints", verify=True)
    assert newest is not None
    assert all(bool(torch.isfinite(values).all()) for _, values in load_ema_state(newest.path))


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
    assert [c.step for c in list_checkpoints(root)] == [2, 4, 6] and not list(root.glob(".step_*"))
    assert [line["step"] for line in read_metrics(recipe.training_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def _start(repository: Path, config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", str(repository / "pipelines" / "pretrain.py"), "--config", str(config), *more]
    return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_step(metrics: Path, step: int, driver: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        lines = read_metrics(metrics)
        if lines and lines[-1]["step"] >= step:
            return lines[-1]["step"]
        assert driver.poll() is None, driver.communicate()[0][-4000:]
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def _rank0(run_dir: Path) -> int:
    """The worker that holds the writer's lock."""
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == str(run_dir / ".writer.lock"):
                return int(entry.parts[2])
        except OSError:
            continue
    raise AssertionError("no worker holds the lock")


@pytest.mark.timeout(1500)
def test_a_run_survives_its_worker_its_driver_and_a_stop(ray_session: str, repository: Path, tmp_path: Path) -> None:
    config = write_recipe(tmp_path, max_steps=300, checkpoint_every=10, log_every=10, validate_every=300, keep_last=2)
    run_dir = tmp_path / "runs" / "small"
    metrics, root = run_dir / "metrics.jsonl", run_dir / "checkpoints"

    # kill -9 of rank 0: Ray starts the workers again, they go on from the newest complete checkpoint.
    driver = _start(repository, config)
    _wait_for_step(metrics, 15, driver)
    other = _start(repository, config)
    out = other.communicate(timeout=300)[0]
    assert other.returncode == 2 and "another process is training" in out, out
    os.kill(_rank0(run_dir), signal.SIGKILL)
    time.sleep(1)
    before = _wait_for_step(metrics, 1, driver)
    _wait_for_step(metrics, before + 12, driver)

    # kill -9 of the driver: the same command goes on by itself, without --resume.
    driver.kill()
    driver.wait()
    newest = latest_complete(root)
    assert newest is not None and newest.step >= 10
    driver = _start(repository, config)
    _wait_for_step(metrics, newest.step + 11, driver)

    # SIGTERM: the step is finished, a checkpoint saved, and the exit status says that it is not done.
    driver.send_signal(signal.SIGTERM)
    out = driver.communicate(timeout=300)[0]
    assert driver.returncode == 143 and "checkpoint saved; the same command goes on" in out, out
    stopped = latest_complete(root, verify=True)
    assert stopped is not None and read_metrics(metrics)[-1]["step"] == stopped.step < 300

    # Another recipe under the same name is refused before anything starts; --resume takes the run over.
    other = _start(repository, config, "--set", "training.learning_rate=2e-3")
    out = other.communicate(timeout=300)[0]
    assert other.returncode == 2 and "add --resume" in out, out
    steps = stopped.step + 5
    last = _start(repository, config, "--set", f"training.max_steps={steps}", "--resume")
    out = last.communicate(timeout=400)[0]
    assert last.returncode == 0, out
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, steps + 1))
    again = _start(repository, config, "--set", f"training.max_steps={steps}", "--resume")
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and "already complete" in out, out
