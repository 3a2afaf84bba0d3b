"""A training run's outputs without the training: a checkpoint in the trainer's format, its encoders, its data's manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from tiny_fluid import TEXT_TOKENS, tiny_config, tiny_pipeline

from fluid_core.config import Recipe, load_recipe
from fluid_core.latents.manifest import Manifest
from fluid_core.workflow.stage import file_sha256, write_json_atomic


def fake_run(folder: Path, **registry: Any) -> Recipe:
    """A recipe with everything that promotion reads, except a checkpoint."""
    pipeline = tiny_pipeline(folder)
    pipeline.image_tokenizer.save_pretrained(folder / "image_tokenizer")
    encoders: dict[str, dict[str, Any]] = {"image": {}, "text": {}}
    for split in ("train", "validation"):
        manifest = Manifest(
            kind="kl", image_size=32, latent_shape=[4, 8, 8], encoders=encoders, latent_mean=[0.0] * 4, latent_std=[1.0] * 4,
            text_mode="tokens", text_dtype="bf16", token_dtype="uint16", null_text={"token_ids": [1]},
            counts={"in": 0, "out": 0, "filtered": {}, "quarantined": {}}, shards=[], settings={"split": split},
        )  # fmt: skip
        write_json_atomic(folder / split / "manifest.json", manifest.model_dump(mode="json"))
    values = {
        "name": "unit",
        "runs_dir": str(folder / "runs"),
        "data": {"image_size": 32},
        "image_tokenizer": {"path": str(folder / "image_tokenizer")},
        "text_encoder": {"path": str(folder / "t5"), "max_tokens": TEXT_TOKENS, "dtype": "fp32"},
        "encode": {"output": str(folder / "train"), "validation_output": str(folder / "validation")},
        "model": tiny_config().model_dump(mode="json"),
        "generation": {"num_steps": 4, "head_steps": 2, "guidance_scale": 2.0, "temperature": 1.0, "solver": "euler"},
        "registry": {
            "tracking_uri": f"sqlite:///{folder}/runs/mlflow.db",
            "experiment": "unit",
            "model_name": "unit",
            **registry,
        },
        "training": {"sample_prompts": ["a red circle", "two blue square"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def add_checkpoint(recipe: Recipe, step: int, loss: float, seed: int, value: float | None = None) -> Path:
    """A complete checkpoint of random weights, or all of one `value`, as the trainer writes them, and its line in validation.jsonl."""
    from tiny_fluid import tiny_model

    folder = recipe.training_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    weights = {name: p.detach().clone() for name, p in tiny_model(seed).named_parameters()}
    if value is not None:
        weights = {name: p.fill_(value) for name, p in weights.items()}
    pieces = {f"{kind}/{name}": w.flatten().clone() for kind in ("master", "ema") for name, w in weights.items()}
    shard = folder / "rank_00000.safetensors"
    save_file(pieces, shard, metadata={"starts": json.dumps(dict.fromkeys(pieces, 0))})
    files = {shard.name: {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}}
    shapes = {name: list(value.shape) for name, value in weights.items()}
    state = {"format_version": 1, "step": step, "world_size": 1, "shapes": shapes, "files": files}
    write_json_atomic(folder / "state.json", state | {"recipe": recipe.model_dump(mode="json")})
    (folder / "_COMPLETE").write_text(hashlib.sha256((folder / "state.json").read_bytes()).hexdigest() + "\n")
    with open(recipe.training_dir / "validation.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "validation_loss": loss + 0.1, "validation_loss_ema": loss}) + "\n")
    return folder
