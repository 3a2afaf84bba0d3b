"""A training run from the driver's side: who may use a run's name, Ray Train, the progress line, and how it ends.

Under torchrun there is no driver and no Ray: each of its processes is a worker, and the one of rank 0 is the driver too.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from fluid_core.config import Recipe
from fluid_core.data.storage import absolute
from fluid_core.entry import WorkFailed, keep_freed_memory, ray_session
from fluid_core.latents.reader import EncodedDataset
from fluid_core.registry.lineage import code_version
from fluid_core.registry.tracking import SPOOL, Tracker
from fluid_core.training.checkpoint import PINNED, list_checkpoints
from fluid_core.training.loader import Slicing, check_datasets
from fluid_core.training.loop import STOP_FILE, RunSettings
from fluid_core.training.metrics import read_metrics
from fluid_core.training.notices import NOTICES, say
from fluid_core.training.ray_data import NAME as RAY_DATASET
from fluid_core.training.ray_data import streaming_dataset
from fluid_core.training.remote import ROLLBACK_FILE, RemoteCheckpoints, WriterLease, fetch_newest
from fluid_core.workflow.stage import write_json_atomic

FAILED_FILE = "failed.json"
"""What made a worker end that would end the next one too."""
_POLL_SECONDS = 0.5
Resume = Literal["same", "any"]


def under_torchrun() -> bool:
    """Whether torchrun started this process, and others for the other workers."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_driver() -> bool:
    """False in those of torchrun's processes that are workers alone."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def pretrain(
    recipe: Recipe,
    fingerprint: str,
    resume: Resume | None = None,
    fresh: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train under Ray Train or torchrun, from the start or from the newest complete checkpoint.

    Checkpoints under the run's name are gone on from only with `resume`: "same" if they are of this fingerprint, "any" whatever
    recipe made them. `fresh` removes them. `begin` is called once the run's name is this start's.

    Returns:
        {"step", "stopped", "metrics"}; `stopped` is the signal's number when SIGTERM or SIGINT asked for an end. Only
        `stopped` where `is_driver()` is False.

    Raises:
        ValueError: the recipe, the data or the run's name will not do, or a worker met such an error.
        WorkFailed: the workers failed more often than training.max_failures allows, or no checkpoint could be written.
        ConnectionError: checkpoints on S3 could not be read at the start, or not be written by the end.
    """
    if under_torchrun():
        recipe.training = recipe.training.model_copy(update={"workers": int(os.environ["WORLD_SIZE"])})
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            resume, fresh = resume or "same", False
    check_inputs(recipe)
    run_dir = recipe.training_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    if not is_driver():
        with _stop_on_signals(run_dir) as signalled:
            _work_here(recipe, RunSettings(str(run_dir), fingerprint, recipe.registry.tracking_uri))
        return {"stopped": signalled[0] if signalled else None}
    root, uri = recipe.training.checkpoint_folder(run_dir), recipe.training.checkpoint_uri
    with _only_driver(run_dir), WriterLease(uri, lambda text: say(run_dir, text)) if uri else nullcontext():
        remote = RemoteCheckpoints(uri) if uri else None
        record = _claim(recipe, run_dir, root, remote, fingerprint, resume, fresh)
        if remote:
            # Before the workers start: they would be taken for hung while they wait for a download. The lines of metrics come
            # first: after a kill between the two the checkpoint is still to be fetched, and they with it.
            remote.fetch_history(run_dir)
            fetch_newest(remote, root, report=lambda text: say(run_dir, text), writer=True)
        begin()
        for name in (STOP_FILE, FAILED_FILE, "result.json"):
            (run_dir / name).unlink(missing_ok=True)
        settings = RunSettings(
            run_dir=str(run_dir),
            fingerprint=fingerprint,
            tracking_uri=record["tracking_uri"],
            tracking_run_id=record["tracking_run_id"],
            tracking_key=record["tracking_key"],
        )
        # In this order: starting Ray puts a handler of its own in the place of ours.
        with nullcontext() if under_torchrun() else ray_session(), _stop_on_signals(run_dir) as signalled:
            with _progress(run_dir, recipe.training.max_steps):
                (_work_here if under_torchrun() else _fit)(recipe, settings)
        result = json.loads((run_dir / "result.json").read_text())
    if not result["uploaded"]:
        raise ConnectionError(
            f"step {result['step']} is reached and saved in {root}, but {uri} still lacks checkpoints (see "
            f"{run_dir / NOTICES}): the same command with --resume copies them"
        )
    # Stopped without a signal here: another node's process had one, or somebody made the file.
    result["stopped"] = (signalled[0] if signalled else int(signal.SIGTERM)) if result["stopped"] else None
    return result


def check_inputs(recipe: Recipe) -> None:
    """Everything that can be known to be wrong before work starts.

    Raises:
        ValueError: with the key to change.
    """
    training = recipe.training
    Slicing(training.batch_size, 0, training.workers, training.micro_batch_size)
    if training.loader == "ray_data" and under_torchrun():
        raise ValueError("training.loader: ray_data needs Ray: under torchrun use loader: parquet")
    if training.loader == "ray_data" and len(recipe.mixture) > 1:
        raise ValueError("training.loader: ray_data reads one data set; use loader: parquet for training.datasets of several")
    datasets = [(EncodedDataset(item.path, item.source), item.weight) for item in recipe.mixture]
    validation = recipe.encode.validation_output
    checked = datasets + ([(EncodedDataset(validation), 1.0)] if validation else [])
    check_datasets(checked, recipe.model, encoder_identities(recipe))


def encoder_identities(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """{"image": {...}, "text": {...}} of the recipe's encoders: the weights' `sha256` of a local folder, else the hub id (`path`,
    `revision`)."""
    from fluid_core.encoders.source import weights_sha256

    found: dict[str, dict[str, Any]] = {}
    for name, section in (("image", recipe.image_tokenizer), ("text", recipe.text_encoder)):
        if Path(section.path).is_dir():
            found[name] = {"sha256": weights_sha256(Path(section.path))}
        elif not section.path.startswith(("/", ".")):
            found[name] = {"path": section.path, "revision": section.revision}
    return found


def _claim(
    recipe: Recipe,
    run_dir: Path,
    root: Path,
    remote: RemoteCheckpoints | None,
    fingerprint: str,
    resume: Resume | None,
    fresh: bool,
) -> dict[str, Any]:
    """Decide whether this start may use what is under the run's name, and note the decision in run.json."""
    path = run_dir / "run.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    if fresh:
        pinned = {c.step for c in list_checkpoints(root) if c.pinned}
        pinned |= {c.step for c in remote.list() if c.pinned} if remote else set()
        if pinned:
            raise ValueError(
                f"{run_dir} has pinned checkpoints (step {', '.join(map(str, sorted(pinned)))}), which --force would delete: choose "
                f"a new training.run_name, or remove {PINNED} from their folders"
            )
        shutil.rmtree(root, ignore_errors=True)
        if remote:
            for checkpoint in remote.list():
                remote.remove(checkpoint)
            remote.remove_history()
        for name in ("metrics.jsonl", "validation.jsonl", "strikes.jsonl", ROLLBACK_FILE, NOTICES, "result.json", "run.json"):
            (run_dir / name).unlink(missing_ok=True)
        record = None
    elif resume != "any" and not (resume and record and record["fingerprint"] == fingerprint):
        _refuse_what_is_there(run_dir, root, remote, record, fingerprint, resume)
    if record is None or (record["fingerprint"] != fingerprint and not resume):
        record = {"fingerprint": fingerprint, "tracking_run_id": None}
        # Begun on another machine, or its run.json is lost: the run in MLflow stays one.
        known = (_newest_state(root, remote) or {}).get("tracking_key") if resume else None
        record |= {"tracking_key": known} if known else {}
    from fluid_core.registry.mlflow_client import absolute_uri

    record |= {
        "fingerprint": fingerprint,
        "tracking_uri": absolute_uri(recipe.registry.tracking_uri),
        "checkpoints": remote.uri if remote else str(root.resolve()),
    }
    # Before MLflow is asked: whoever reaches it first, now or after a kill, makes the one run of this key.
    record.setdefault("tracking_key", uuid.uuid4().hex)
    write_json_atomic(path, record)
    tags = {"fluid.stage": "pretrain", "fluid.fingerprint": fingerprint, "fluid.code": code_version()}
    tracker = Tracker(
        record["tracking_uri"], recipe.registry.experiment, recipe.training_dir.name, run_id=record["tracking_run_id"],
        key=record["tracking_key"], tags=tags, spool_dir=run_dir.parent / SPOOL,
    )  # fmt: skip
    tracker.set_tags(tags)  # a run that goes on may do so with newer code
    tracker.log_params(recipe.model_dump(mode="json"))
    for data in sorted({item.path for item in recipe.mixture}):
        tracker.log_dataset(Path(data).name, EncodedDataset(data).manifest.hash, data)
    tracker.close("FINISHED")
    record["tracking_run_id"] = tracker.run_id
    write_json_atomic(path, record)
    return record


def _refuse_what_is_there(
    run_dir: Path,
    root: Path,
    remote: RemoteCheckpoints | None,
    record: dict[str, Any] | None,
    fingerprint: str,
    resume: Resume | None,
) -> None:
    """Raise ValueError for checkpoints under the run's name that nobody asked to go on from."""
    here, there = list_checkpoints(root), remote.list() if remote else []
    steps = [c.step for c in here if c.complete] + [c.step for c in there if c.complete]
    # The newest checkpoint knows it where the run was begun on another machine, or its run.json is lost.
    known = [record or {}, _newest_state(root, remote) or {}]
    same = any(one.get("fingerprint") == fingerprint for one in known)
    if not (here or there) or (same and (resume or not steps)):
        return
    where = run_dir if remote is None or here else remote.uri
    what = "this very run" if same else "a run of another recipe or other data"
    raise ValueError(
        f"{where} holds {what} ({f'step {max(steps)}' if steps else 'no complete checkpoint'}): add --resume to go on from its last "
        "checkpoint, choose a new training.run_name, or --force to begin again and delete its checkpoints"
    )


def _newest_state(root: Path, remote: RemoteCheckpoints | None) -> dict[str, Any] | None:
    """The state of the newest complete checkpoint, here or on S3; None where there is none."""
    here = [c for c in list_checkpoints(root) if c.complete]
    if remote:
        for checkpoint in reversed([c for c in remote.list() if c.complete and (not here or c.step > here[-1].step)]):
            # One whose marker is not for its state is passed over, as fetch_newest does.
            with suppress(ValueError):
                return remote.state(checkpoint.step)
    return here[-1].state if here else None


def worker(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    if Path(config["directory"]).is_dir():
        os.chdir(config["directory"])
    import torch

    torch.set_num_threads(config["threads"])
    settings = RunSettings(**config["settings"])
    failed = Path(settings.run_dir) / FAILED_FILE
    if failed.exists():  # Ray starts all workers again after any error, and this one would only come back
        return
    try:
        if not (failed.parent / "run.json").exists():
            raise ValueError(_not_shared(failed.parent))
        _train_here(Recipe.model_validate(config["recipe"]), settings)
    except ValueError as error:
        write_json_atomic(failed, {"error": str(error)})
        raise


def _not_shared(run_dir: Path) -> str:
    return f"workers and driver do not see the same {run_dir}: set runs_dir to a folder that all machines share"


def _work_here(recipe: Recipe, settings: RunSettings) -> None:
    """A worker of torchrun's."""
    try:
        _train_here(recipe, settings)
    except OSError as error:
        raise WorkFailed(f"training failed: {error}; --resume goes on from the last checkpoint") from error


def _train_here(recipe: Recipe, settings: RunSettings) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_gpu() else "cpu")
    from fluid_core.training.loop import TrainingLoop

    run_worker(recipe, settings, TrainingLoop)


def run_worker(recipe: Recipe, settings: RunSettings, loop: Any) -> None:
    """Train in the process group that the environment describes; rank 0 leaves result.json."""
    import deepspeed
    import torch

    from fluid_core.training.engine import device, quiet
    from fluid_core.training.native import without_extensions

    quiet()
    if device().type == "cpu":
        without_extensions()
    else:
        torch.cuda.set_device(device())
    deepspeed.init_distributed("nccl" if device().type == "cuda" else "gloo")
    training = loop(recipe, settings)
    result = training.run()
    if training.rank == 0:
        write_json_atomic(Path(settings.run_dir) / "result.json", result)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _fit(recipe: Recipe, settings: RunSettings) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    training = recipe.training
    have = ray.cluster_resources()
    # Ray Data's tasks need a CPU that no worker holds.
    cpus = float(training.workers + (training.loader == "ray_data"))
    for name, wanted in (("CPU", cpus), ("GPU", training.workers * training.gpus_per_worker)):
        if have.get(name, 0.0) < wanted:
            raise ValueError(
                f"training asks for {wanted:g} {name}s and Ray has {have.get(name, 0.0):g}: lower training.workers"
                + (" or training.gpus_per_worker" if name == "GPU" else "")
            )
    resources = {"CPU": 1.0} | ({"GPU": training.gpus_per_worker} if training.gpus_per_worker else {})
    # Ray's own bookkeeping of the run; checkpoints are ours, so a name of its own each time.
    scratch = Path(settings.run_dir) / "ray"

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ctrl-C is ours, it saves a checkpoint; Ray's handler would abort the workers."""

    streamed: dict[str, Any] = {}
    if training.loader == "ray_data":
        item = recipe.mixture[0]
        dataset, config = streaming_dataset(EncodedDataset(absolute(item.path), item.source), recipe.seed)
        streamed = {"datasets": {RAY_DATASET: dataset}, "dataset_config": config}
    trainer = Trainer(
        worker,
        **streamed,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "settings": asdict(settings),
            "directory": os.getcwd(),
            "threads": max(1, (os.cpu_count() or 1) // training.workers) if not training.gpus_per_worker else 4,
        },
        torch_config=TorchConfig(backend="nccl" if training.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=training.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # the checker sees the class of Train V1
            name=f"pretrain-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=training.max_failures),
            # Without GPUs of their own they must not take those that the machine may have.
            worker_runtime_env={}
            if training.gpus_per_worker
            else {"env_vars": keep_freed_memory() | {"CUDA_VISIBLE_DEVICES": ""}},
        ),
    )
    failed = Path(settings.run_dir) / FAILED_FILE
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if not failed.exists():
            raise _failure(error, training.max_failures) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if failed.exists():
        raise ValueError(json.loads(failed.read_text())["error"])
    if not (failed.parent / "result.json").exists():
        raise ValueError(_not_shared(failed.parent))


def _failure(error: Exception, max_failures: int) -> Exception:
    """What to raise for workers that failed too often: one line where disks or machines did, else `error` with its tracebacks.

    One worker's error makes others lose their connection to it, so theirs say nothing.
    """
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    found = [getattr(failure, "_base_exc", failure) for failure in getattr(error, "worker_failures", {}).values()]
    if hasattr(error, "controller_failure"):
        found.append(error.controller_failure)
    again = f"(failure {max_failures + 1}, training.max_failures is {max_failures}); --resume goes on from the last checkpoint"
    for failure in found:
        if isinstance(failure, OSError):
            return WorkFailed(f"training failed: {failure} {again}")
    for failure in found:
        if isinstance(failure, RayError | RayTrainError):
            return WorkFailed(f"training failed, a worker was lost: {' '.join(str(failure).split())[:300]} {again}")
    return error


@contextmanager
def _only_driver(run_dir: Path) -> Iterator[None]:
    with open(run_dir / ".driver.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is training into {run_dir}: wait for it, or choose another training.run_name"
            ) from None
        yield


@contextmanager
def _stop_on_signals(run_dir: Path) -> Iterator[list[int]]:
    """SIGTERM and the first Ctrl-C ask the workers to save and end; a second one ends at once."""
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("stopping: the workers finish their step and save a checkpoint", file=sys.stderr, flush=True)
        (run_dir / STOP_FILE).touch()

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (run_dir / STOP_FILE).unlink(missing_ok=True)


@contextmanager
def _progress(run_dir: Path, total: int) -> Iterator[None]:
    """A line on stderr with step, loss, speed and time left, from what rank 0 writes; and the workers' notices."""
    path, notices = run_dir / "metrics.jsonl", run_dir / NOTICES
    stop = threading.Event()
    started = [len(read_metrics(path))]
    already_said = notices.stat().st_size if notices.is_file() else 0

    def show() -> None:
        with tqdm(total=total, initial=started[0], desc="pretrain", unit="step", dynamic_ncols=True) as bar:
            position, said = 0, already_said
            ending = False
            while not ending:
                ending = stop.wait(_POLL_SECONDS)
                if notices.is_file():
                    with open(notices) as file:
                        file.seek(said)
                        for text in file:
                            bar.write(f"pretrain: {text.partition(' ')[2]}", end="")  # stdout: `make demo` shows it too
                        said = file.tell()
                if not path.is_file():
                    continue
                if path.stat().st_size < position:  # went back to a checkpoint
                    position = 0
                with open(path) as file:
                    file.seek(position)
                    text = file.read()
                whole = text[: text.rfind("\n") + 1]
                position += len(whole.encode())
                if whole:
                    line = json.loads(whole.splitlines()[-1])
                    if line["loss"] is not None:
                        bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
                    if line["step"] < bar.n:  # went back to a checkpoint: speed and time left are counted from there
                        bar.reset(total)
                        bar.initial = bar.n = bar.last_print_n = line["step"]
                    bar.update(line["step"] - bar.n)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10.0)
