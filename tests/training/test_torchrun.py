"""The trainer without Ray: torchrun starts `pipelines/pretrain.py` once for each worker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from small_run import run_workers, small_recipe

from fluid_core.training.metrics import read_metrics


def _torchrun(repository: Path, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pipelines/pretrain.py"]
    return subprocess.Popen(
        [*command, "--config", str(folder / "recipe.yaml"), *arguments], cwd=repository, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


def _is_worker(process: Path, parent: int, rank: int) -> bool:
    try:
        stat, environment = (process / "stat").read_text(), (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return int(stat.rpartition(")")[2].split()[1]) == parent and f"RANK={rank}".encode() in environment


def test_a_run_that_was_stopped_and_went_on_is_the_run_of_plain_workers(repository: Path, tmp_path: Path) -> None:
    """SIGTERM to one worker, as when one of several nodes goes, saves a checkpoint; with --resume the same command goes on."""
    recipe = small_recipe(tmp_path / "reference", optimizer="muon", max_steps=40, checkpoint_every=40, validate_every=40)
    run_workers(recipe)
    expected = read_metrics(recipe.training_dir / "metrics.jsonl")

    folder = tmp_path / "torchrun"
    here = small_recipe(folder, optimizer="muon", max_steps=40, checkpoint_every=40, validate_every=40, workers=3)
    run = _torchrun(repository, folder)
    metrics = here.training_dir / "metrics.jsonl"
    while run.poll() is None and not read_metrics(metrics):
        time.sleep(0.01)
    for process in Path("/proc").glob("[0-9]*"):
        if _is_worker(process, run.pid, 1):
            os.kill(int(process.name), signal.SIGTERM)
    said, _ = run.communicate(timeout=120)
    assert run.returncode and 0 < len(read_metrics(metrics)) < 40, said
    assert not list(tmp_path.rglob("stages/pretrain.json")), "a stopped run is not recorded as complete"

    run = _torchrun(repository, folder, "--resume", "same")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and said.count("pretrain: 40 steps") == 1, said
    lines = read_metrics(metrics)
    for name in ("step", "loss", "grad_norm", "keys_sha256"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    assert json.loads((here.training_dir / "run.json").read_text())["tracking_run_id"]
