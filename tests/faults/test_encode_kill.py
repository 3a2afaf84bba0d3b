"""kill -9 of driver, encode worker and raylet at random moments: run again, and the data set is the undisturbed one.

FLUID_KILL_SEEDS=20 runs every kind with that many seeds; the normal suite takes one of each.
"""

import functools
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from encoding_support import content, encode_here, make_shards, recipe_values
from forked import Program

from fluid_core.config import Recipe

SHARDS, SAMPLES = 24, 24
SEEDS = int(os.environ.get("FLUID_KILL_SEEDS", "1"))


@functools.cache
def reference() -> tuple[Path, dict[str, str]]:
    """(folder of the shards, the undisturbed output's files)."""
    folder = Path(tempfile.mkdtemp(prefix="fluid-kill-"))
    make_shards(folder / "data", SHARDS, SAMPLES)
    encode_here(Recipe.model_validate(recipe_values(folder, [str(folder / "data")], folder / "out")))
    return folder / "data", content(folder / "out")


class Encoding:
    """The pipeline as a process of its own."""

    def __init__(self, folder: Path, own_ray: bool):
        data, _ = reference()
        self.output = folder / "out"
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_values(folder, [str(data)], self.output)))
        self.command = ["pipelines/encode_dataset.py", "--config", str(recipe)]
        self.environment = {k: v for k, v in os.environ.items() if not (own_ray and k == "RAY_ADDRESS")}
        self.log = folder / "log"
        self.process = self.start()

    def start(self) -> Program:
        return Program(self.command, self.log, self.environment, start_new_session=True)

    def committed(self) -> int:
        return len(list((self.output / "_ledger").glob("*.json")))

    def wait_for(self, shards: int) -> bool:
        """True once so many shards are committed; False when the process ends before."""
        while self.committed() < shards:
            if self.process.poll() is not None:
                return False
            time.sleep(0.003)
        return True

    def finish(self, timeout: float = 240) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"the pipeline hangs:\n{self.log.read_text()[-3000:]}") from None

    def text(self) -> str:
        return self.log.read_text()[-3000:]


def check(encoding: Encoding) -> None:
    assert content(encoding.output) == reference()[1], encoding.text()
    assert not (encoding.output / "_tmp").exists()


def kill_descendants(pid: int, wanted: Callable[[psutil.Process], bool], rng: random.Random) -> bool:
    found = [p for p in psutil.Process(pid).children(recursive=True) if wanted(p)]
    if found:
        rng.choice(found).kill()
    return bool(found)


def is_encode_worker(process: psutil.Process) -> bool:
    return "".join(process.cmdline()).startswith(("ray::MapWorker", "ray::Committer", "ray::map"))


def test_killed_three_times_each_at_any_moment(tmp_path):
    """The commit protocol under a finer comb than Ray allows: forked encoders, killed anywhere in their work."""
    data, _ = reference()
    command = [str(Path(__file__).with_name("encode_zygote.py")), str(data), str(tmp_path), str(max(3, SEEDS))]
    _, out = Program(command, tmp_path / "log").end()
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(results) == max(3, SEEDS), out[-2000:]
    assert all(result["same"] for result in results), results
    assert sum(result["kills"] for result in results) >= len(results)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_driver_killed(seed, tmp_path, ray_session):
    rng = random.Random(seed)
    encoding = Encoding(tmp_path, own_ray=False)
    for _ in range(2 if seed else 1):
        if encoding.wait_for(rng.randrange(0, SHARDS - 1)):
            time.sleep(rng.random() * 0.05)
            os.killpg(encoding.process.pid, signal.SIGKILL)
        encoding.finish()
        encoding.process = encoding.start()
    assert encoding.finish() == 0, encoding.text()
    check(encoding)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_raylet_killed_and_then_workers(seed, tmp_path):
    rng = random.Random(seed)
    encoding = Encoding(tmp_path, own_ray=True)
    assert encoding.wait_for(rng.randrange(1, SHARDS // 2)), encoding.text()
    assert kill_descendants(encoding.process.pid, lambda p: p.name() == "raylet", rng)
    encoding.finish(120)
    left = range(encoding.committed() + 1, SHARDS - 1)
    encoding.process = encoding.start()
    killed = 0
    for target in sorted(rng.sample(left, 2 if SEEDS > 1 else 1)):
        if encoding.wait_for(target):
            killed += kill_descendants(encoding.process.pid, is_encode_worker, rng)
    assert encoding.finish() == 0, encoding.text()  # the same run heals itself
    assert killed
    check(encoding)
