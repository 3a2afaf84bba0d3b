"""Training whose checkpoints go to S3, while S3 is down and while the trainer dies: real processes, a real server."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_support import ACCESS_KEY, BUCKET, SECRET_KEY, FaultyProxy, seaweed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from small_run import small_recipe, start_workers

from fluid_core.training.metrics import read_metrics
from fluid_core.training.remote import RemoteCheckpoints


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with seaweed(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    faulty = FaultyProxy(server)
    for name, value in {
        "AWS_ENDPOINT_URL": faulty.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield faulty
    faulty.close()


_SHORT_PAUSES = """
import fluid_core.data.storage as storage, fluid_core.training.remote as remote
storage.FIRST_PAUSE_SECONDS = 0.01
remote.FIRST_PAUSE_SECONDS = 0.2
"""


def test_s3_is_down_while_a_run_trains_to_its_end(proxy: FaultyProxy, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/down"
    recipe = small_recipe(tmp_path, workers=1, keep_last=2, checkpoint_path=uri)
    proxy.fault = lambda method, path: "503"
    (worker,) = start_workers(recipe, _SHORT_PAUSES)
    deadline = time.monotonic() + 200
    while len(read_metrics(recipe.training_dir / "metrics.jsonl")) < 6 and worker.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # All steps are done and S3 has not answered once. It does from now on.
    time.sleep(1)
    assert worker.poll() is None and len(proxy.seen) > 6
    proxy.fault = lambda method, path: None
    out = worker.communicate(timeout=200)[0]
    assert worker.returncode == 0, out
    assert "checkpoints could not be copied" in out and "again after" in out
    notices = (recipe.training_dir / "notices.txt").read_text()
    assert f"they are safe in {recipe.training_dir / 'checkpoints'}" in notices
    remote = RemoteCheckpoints(uri)
    assert [(c.step, remote.problem(c)) for c in remote.list()] == [(4, None), (6, None)]
