"""`ray job submit --working-dir .`, as the manifests and the README have it, on a Ray with its dashboard."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell that submits jobs to a cluster whose nodes have FLUID_HOME = tmp_path."""
    gcs, dashboard, agent = _free_ports(3)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    # Unix socket paths are limited to 107 bytes, so not under pytest's own (long) temp folder.
    with tempfile.TemporaryDirectory(prefix="fluid-test-", ignore_cleanup_errors=True) as scratch:
        command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={scratch}"]
        command += [f"--dashboard-agent-listen-port={agent}", "--object-store-memory=200000000"]
        head = subprocess.Popen(
            command, env=environment | {"FLUID_HOME": str(tmp_path)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        head.terminate()
        head.wait()


def test_a_job_brings_its_code_and_leaves_its_files_under_fluid_home(
    jobs: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    command += [sys.executable, "pipelines/prepare_shapes.py", "--config", "configs/tiny.yaml"]
    command += ["--set", "data.shapes.train_scenes=8", "data.shapes.validation_scenes=4"]
    deadline = time.monotonic() + 120
    while True:
        job = subprocess.run(command, cwd=repository, env=jobs, capture_output=True, text=True, check=False)
        said = job.stdout + job.stderr
        if job.returncode == 0 or "prepare_shapes" in job.stdout:
            break
        assert time.monotonic() < deadline, said  # the cluster is starting
        time.sleep(1)
    assert job.returncode == 0 and "16 scenes in runs/tiny/data/shapes" in said, said
    assert list((tmp_path / "runs" / "tiny" / "data" / "shapes" / "train").glob("*.tar"))
