"""What all tests share: one thread each, a temporary MLflow, no network, and one Ray of their own.

A user's running Ray cluster and the folder runs/ are never touched: Ray is started with `address="local"` in a temp folder
of its own, and everything is written under pytest's temp folders.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch, Ray or MLflow are imported by any test module.
for _name in ("RAY_ADDRESS", "FLUID_PARENT_RUN_ID", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
    os.environ.pop(_name, None)
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    # Ray Train looks every 2 s whether its workers live or are done: longer than the tests' runs take.
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
    # One process less a run; the test of a notice of preemption has it.
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    MLFLOW_DISABLE_TELEMETRY="true",
)

import pytest  # noqa: E402
import torch  # noqa: E402
from s3_support import BUCKET, FaultyProxy, environment, seaweed  # noqa: E402

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A temporary MLflow database (created by its first user), also the default of every subprocess."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """One local Ray (4 logical CPUs) for the whole pytest session; subprocess pipelines join it through RAY_ADDRESS."""
    import ray

    from fluid_core.entry import _start_local_ray

    # Unix socket paths are limited to 107 bytes, so not under pytest's own (long) temp folder.
    with tempfile.TemporaryDirectory(prefix="fluid-test-", ignore_cleanup_errors=True) as scratch:
        _start_local_ray(
            num_cpus=4,
            object_store_memory=512 * 1024**2,
            _temp_dir=scratch,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        address = ray.get_runtime_context().gcs_address
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", address)
            yield address
            if "ray.serve" in sys.modules:
                from ray import serve

                serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real S3 server."""
    with seaweed(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def s3(s3_endpoint: str) -> Iterator[str]:
    """The URI of a bucket that AWS clients reach while the module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3_endpoint).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the server, which AWS clients reach through it; pauses between attempts are short."""
    from fluid_core.data import storage

    faulty = FaultyProxy(s3_endpoint)
    for name, value in environment(faulty.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 1)
    yield faulty
    faulty.close()
