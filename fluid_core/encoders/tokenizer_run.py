"""Training a tokenizer from the driver's side: images in, Ray Train, progress and MLflow, a diffusers folder out."""

import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from fluid_core.config import Recipe, TokenizerTrainingConfig
from fluid_core.data.shard_writer import require_disk
from fluid_core.encoders.autoencoder import build_tokenizer
from fluid_core.encoders.pixels import collect_pixels, list_tars, open_pixels
from fluid_core.encoders.tokenizer_training import PROGRESS, Mixture, train_tokenizer_worker
from fluid_core.entry import keep_freed_memory, ray_session
from fluid_core.registry.tracking import Tracker
from fluid_core.workflow.stage import replace_folder, write_json_atomic

RECORD = "training.json"
POLL_SECONDS = 1.0


def work_folder(recipe: Recipe) -> Path:
    """Where pixels, checkpoints, progress and reconstructions of the run are."""
    return recipe.run_dir / "tokenizer_training"


def train_tokenizer(recipe: Recipe, fingerprint: str) -> dict[str, Any]:
    """Train `image_tokenizer.train` and write the folder `image_tokenizer.path`, whole or not at all.

    Killed at any point and called again with the same fingerprint, it goes on from its last checkpoint.

    Returns:
        {"metrics": {"psnr_NAME": dB, ...}, "parameters", "set_aside"}.

    Raises:
        ValueError: no images, a geometry that does not fit, a folder that somebody else made, too few CPUs.
    """
    config = recipe.image_tokenizer.train
    assert config is not None
    target = Path(recipe.image_tokenizer.path)
    if target.exists() and not (target / RECORD).is_file():
        raise ValueError(
            f"image_tokenizer.path {target} was not trained here: remove `train` to use it, or name another folder"
        )
    with torch.device("meta"):
        build_tokenizer(recipe.image_tokenizer, recipe.data.image_size)
    work = work_folder(recipe)
    pixels = _pixels(recipe, work, fingerprint)
    Mixture(open_pixels(work / "train", pixels["train_sets"]), config.weights, recipe.seed)

    settings = {
        "image_tokenizer": recipe.image_tokenizer.model_dump(),
        "image_size": recipe.data.image_size,
        "seed": recipe.seed,
        "work": str(work.resolve()),
        "fingerprint": fingerprint,
        **pixels,
    }
    with Tracker(recipe.registry.tracking_uri, recipe.registry.experiment, "train_tokenizer") as tracker:
        tracker.log_params({"image_tokenizer": recipe.image_tokenizer.model_dump(), "image_size": recipe.data.image_size})
        for name in pixels["train_sets"]:
            tracker.log_dataset(name, fingerprint, ", ".join(recipe.data.sources))
        with ray_session(), _follow(work / PROGRESS, config, tracker):
            _fit(config, settings, work)
        result = json.loads((work / "result.json").read_text())
        tracker.log_metrics(result["metrics"], step=config.max_steps)
        tracker.log_image(Image.open(work / "reconstructions.png"), "reconstructions", step=config.max_steps)

    write_json_atomic(work / "model" / RECORD, {"fingerprint": fingerprint, "metrics": result["metrics"]})
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(work / "model", target)
    for left in ("train", "heldout", "ray"):
        shutil.rmtree(work / left, ignore_errors=True)
    for left in ("last.pt", "pixels.json"):
        (work / left).unlink(missing_ok=True)
    return result | {"set_aside": pixels["set_aside"]}


def _pixels(recipe: Recipe, work: Path, fingerprint: str) -> dict[str, Any]:
    """Decode the images, unless an earlier try of the same run did; what belongs to another run is removed."""
    record = work / "pixels.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if found.pop("fingerprint") == fingerprint:
            return found
    shutil.rmtree(work, ignore_errors=True)
    train_tars = list_tars(recipe.data.sources, "data.sources")
    heldout_tars = list_tars(recipe.data.validation_sources, "data.validation_sources")
    # Decoded pixels take more room than their files: PNG and JPEG pack an image 4 to 20 times.
    require_disk(work, 20 * sum(tar.stat().st_size for tar in train_tars + heldout_tars) + (64 << 20))
    train_sets, bad = collect_pixels(train_tars, recipe.data.image_size, work / "train")
    heldout_sets, bad_heldout = collect_pixels(heldout_tars, recipe.data.image_size, work / "heldout")
    found = {"train_sets": train_sets, "heldout_sets": heldout_sets, "set_aside": bad + bad_heldout}
    write_json_atomic(record, {"fingerprint": fingerprint, **found})
    return found


def _fit(config: TokenizerTrainingConfig, settings: dict[str, Any], work: Path) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    have = ray.cluster_resources()
    for name, wanted in (("CPU", float(config.workers)), ("GPU", config.workers * config.gpus_per_worker)):
        if have.get(name, 0.0) < wanted:
            raise ValueError(
                f"image_tokenizer.train asks for {wanted:g} {name}s and Ray has {have.get(name, 0.0):g}: "
                "lower image_tokenizer.train.workers"
            )
    resources: dict[str, float] = {"CPU": 1.0}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    TorchTrainer(
        train_tokenizer_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # A name of its own each time: Ray would go on with a run of the same name, and our checkpoint is what counts.
        run_config=RunConfig(  # type: ignore[call-arg]  # the checker sees the class of Train V1
            name=f"train_tokenizer-{uuid.uuid4().hex[:8]}",
            storage_path=str((work / "ray").resolve()),
            failure_config=FailureConfig(max_failures=3),
            worker_runtime_env={} if config.gpus_per_worker else {"env_vars": keep_freed_memory()},
        ),
    ).fit()


@contextmanager
def _follow(path: Path, config: TokenizerTrainingConfig, tracker: Tracker) -> Iterator[None]:
    """Show and log what rank 0 writes to its progress file while the block runs."""
    stop = threading.Event()
    seen = path.stat().st_size if path.is_file() else 0
    thread = threading.Thread(target=_tail, args=(path, seen, config.max_steps, tracker, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10.0)


def _tail(path: Path, position: int, total: int, tracker: Tracker, stop: threading.Event) -> None:
    with tqdm(total=total, desc="training the tokenizer", unit="step") as bar:
        ending = False
        while not ending:
            ending = stop.wait(POLL_SECONDS)  # one more look after the end
            if not path.is_file():
                continue
            if path.stat().st_size < position:  # resumed: lines past its checkpoint were dropped
                position = path.stat().st_size
            with open(path) as file:
                file.seek(position)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            position += len(whole.encode())
            for line in whole.splitlines():
                values = json.loads(line)
                step = values.pop("step")
                bar.update(step - bar.n)
                if "loss" in values:
                    bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                tracker.log_metrics({f"tokenizer_{k}": v for k, v in values.items() if k != "seconds"}, step=step)
