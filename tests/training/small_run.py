"""A small encoded data set made by code, a recipe for it, and runs in plain gloo processes (Ray adds nothing to most tests)."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from forked import Program
from safetensors.torch import save_file
from torch.distributed import TCPStore

from fluid_core.config import Recipe, load_recipe
from fluid_core.encoders.text import TextEncoder
from fluid_core.latents.manifest import Manifest, Shard
from fluid_core.latents.writer import file_sha256, latents_writer, null_text, tensor_bytes, text_writer
from fluid_core.training.checkpoint import Checkpoint
from fluid_core.workflow.stage import write_json_atomic

WIDTH = 16


def write_encoders(folder: Path) -> TextEncoder:
    """The encoders that `write_recipe` names, `folder`/vae and `folder`/t5, with random weights. Returns the T5, in bf16."""
    from tiny_fluid import tiny_pipeline

    tiny_pipeline(folder).image_tokenizer.save_pretrained(folder / "vae")
    return TextEncoder.from_pretrained(folder / "t5", max_tokens=8)


def write_dataset(
    root: Path,
    rows: int = 48,
    shards: int = 2,
    group: int = 8,
    seed: int = 0,
    text_mode: str = "embeddings",
    text_encoder: TextEncoder | None = None,
) -> Path:
    """`rows` random samples of 4x8x8 latents and captions of 2 to 6 tokens of width 16.

    With a `text_encoder` the states are its own for random token ids.
    """
    generator = torch.Generator().manual_seed(seed)
    null = torch.zeros(1, WIDTH) if text_encoder is None else text_encoder.encode_ids([[1]])[0]
    (root / "latents").mkdir(parents=True)
    (root / "text").mkdir()
    entries = []
    for shard in range(shards):
        name = f"shard{shard:03d}"
        latents = latents_writer(root / "latents" / f"{name}.parquet", "kl", False, {})
        texts = text_writer(root / "text" / f"{name}.parquet", {})
        groups = []
        for first in range(0, rows // shards, group):
            n = min(group, rows // shards - first)
            keys = [f"{name}-{first + i:04d}" for i in range(n)]
            moments = torch.cat(
                (torch.randn(n, 4, 8, 8, generator=generator), torch.full((n, 4, 8, 8), -3.0)), dim=1
            ).bfloat16()
            lengths = [2 + (first + i) % 5 for i in range(n)]
            states = [torch.randn(length, WIDTH, generator=generator).bfloat16() for length in lengths]
            ids = [torch.randint(3, 30, (length,), generator=generator).tolist() for length in lengths]
            if text_encoder is not None:
                states = text_encoder.encode_ids(ids)
            latents.write_group(
                {
                    "key": keys, "sha256": keys, "captions": [[f"caption {k}"] for k in keys], "width": [64] * n, "height": [64] * n,
                    "crop": [[0, 0, 64, 64]] * n, "latent_size": [[8, 8]] * n,
                    "token_ids": [[np.array(row, dtype="<u2").tobytes()] for row in ids], "metadata": ["{}"] * n,
                    "moments": tensor_bytes(moments),
                }
            )  # fmt: skip
            texts.write_group({"key": keys, "embeddings": [[s.view(torch.int16).numpy().tobytes()] for s in states]})
            groups.append(n)
        latents.close()
        texts.close()
        file, text = root / "latents" / f"{name}.parquet", root / "text" / f"{name}.parquet"
        entries.append(
            Shard(
                id=name, uri=name, rows=rows // shards, row_groups=groups, bytes=file.stat().st_size, sha256=file_sha256(file),
                text_bytes=text.stat().st_size, text_sha256=file_sha256(text),
            )
        )  # fmt: skip
    manifest = Manifest(
        kind="kl", image_size=64, latent_shape=[4, 8, 8], encoders={"image": {}, "text": {"width": WIDTH, "max_tokens": 8}},
        latent_mean=[0.0] * 4, latent_std=[1.0] * 4, text_mode=text_mode, text_dtype="bf16", token_dtype="uint16",
        null_text=null_text([1], null), counts={"in": rows, "out": rows, "filtered": {}, "quarantined": {}},
        shards=entries,
    )  # fmt: skip
    (root / "manifest.json").write_text(manifest.dumps())
    return root


def write_recipe(folder: Path, data: dict[str, Any] | None = None, **training: Any) -> Path:
    """A recipe beside its data, width 32 and 2 blocks, fp32 and everything drawn from seed 0. `data`: for `write_dataset`."""
    if not (folder / "data").exists():
        write_dataset(folder / "data", **(data or {}))
        write_dataset(folder / "validation", **{**(data or {}), "rows": 16, "shards": 2, "seed": 1})
    values = {
        "name": "small", "runs_dir": str(folder / "runs"),
        "data": {"image_size": 64}, "image_tokenizer": {"path": str(folder / "vae")}, 
        "text_encoder": {"path": str(folder / "t5"), "max_tokens": 8},
        "encode": {"output": str(folder / "data"), "validation_output": str(folder / "validation")},
        "model": {
            "preset": "fluid-tiny", "blocks": 2, "width": 32, "heads": 2, "aligner_blocks": 1, "head_blocks": 1, "grid": 4,
            "text_width": WIDTH, "max_text_tokens": 8, "objective": "flow",
        },
        "generation": {"solver": "heun"},
        "training": {
            "max_steps": 6, "batch_size": 12, "workers": 2, "precision": "fp32", "learning_rate": 1e-3, "schedule": "constant",
            "muon_learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.9, "checkpoint_every": 2, "log_every": 1, "validate_every": 3,
            "validation_samples": 16, "sample_every": 1000, "keep_last": 10, **training,
        },
        "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "experiment": "small"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def small_recipe(folder: Path, data: dict[str, Any] | None = None, **training: Any) -> Recipe:
    return load_recipe(write_recipe(folder, data, **training))


def write_checkpoint(root: Path, step: int, **state: Any) -> Checkpoint:
    """A complete checkpoint of two shards whose values are its step; `state` is added to its state.json."""
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    files = {}
    for rank in (0, 1):
        shard = folder / f"rank_{rank:05d}.safetensors"
        save_file({"master/w": torch.full((1000,), float(step + rank))}, shard, metadata={"starts": '{"master/w": 0}'})
        files[shard.name] = {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    write_json_atomic(folder / "state.json", {"step": step, "world_size": 2, "files": files} | state)
    (folder / "_COMPLETE").write_text(hashlib.sha256((folder / "state.json").read_bytes()).hexdigest() + "\n")
    return Checkpoint(folder, step)


_WORKER = """
import os, sys, json, torch
sys.path.insert(0, {root!r}); sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from fluid_core.config import Recipe
from fluid_core.training.loop import RunSettings, TrainingLoop
from fluid_core.training.run import run_worker
import fluid_core.training.loop as module
class NoTracker:  # MLflow takes longer to start than these runs; tests/faults trains with the real one
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): return lambda *args, **kwargs: None
module.Tracker = NoTracker
job = json.loads(sys.argv[1])
loop = TrainingLoop
{patch}
run_worker(Recipe.model_validate(job["recipe"]), RunSettings(**job["settings"]), loop)
torch.distributed.destroy_process_group()
"""


def as_torchrun() -> dict[str, str]:
    """The environment in which torchrun starts its only process: driver and worker in one, without Ray."""
    return os.environ | {
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


def start_workers(recipe: Recipe, patch: str = "", resume: bool = True, fingerprint: str = "f") -> list[Program]:
    """One process for each worker. `patch`: Python run before the loop starts, which may rebind `loop`."""
    root = Path(__file__).resolve().parents[2]
    code = _WORKER.format(root=str(root), here=str(root / "tests" / "training"), patch=patch)
    settings = {
        "run_dir": str(recipe.training_dir), "fingerprint": fingerprint, "tracking_uri": recipe.registry.tracking_uri, "resume": resume,
    }  # fmt: skip
    job = json.dumps({"recipe": recipe.model_dump(mode="json"), "settings": settings})
    # Rank 0 would open the store on a port that was free a moment ago. Where another test took it meanwhile, rank 0 fails and the
    # others wait for it; so the store is here, and all are its clients, as under torchrun.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Path(recipe.runs_dir).mkdir(parents=True, exist_ok=True)
    workers = []
    for rank in range(recipe.training.workers):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(recipe.training.workers), "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        log = Path(tempfile.mkstemp(suffix=".log", dir=recipe.runs_dir)[1])
        workers.append(Program(["-c", code, job], log, environment))
        workers[-1].store = store  # as long as the workers
    return workers


def run_workers(recipe: Recipe, patch: str = "", resume: bool = True, ok: bool = True) -> str:
    """Start, wait, and return what they printed. With `ok` every worker must end well."""
    workers = start_workers(recipe, patch, resume)
    try:
        out = "".join(worker.end()[1] for worker in workers)
    except AssertionError:  # one hangs: pytest shows what the others said
        print(*(worker.output()[-3000:] for worker in workers), sep="\n")
        raise
    finally:
        for worker in workers:
            worker.kill()
    if ok:
        assert all(worker.returncode == 0 for worker in workers), out[-6000:]
    return out
