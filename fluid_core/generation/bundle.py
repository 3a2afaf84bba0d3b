"""The model bundle: a folder with everything that generation needs, hashed file by file.

config.json           format version, model, generation defaults, where the two encoders are
model-*.safetensors   weights, in files of at most 5 GB, with an index when there are several
image_tokenizer/      a diffusers folder; text_encoder/ a transformers folder, or a pinned hub reference in config.json
latent_stats.json     mean and std for each latent channel (continuous tokens)
README.md             the model card
manifest.json         sha256 of every other file, written last
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluid_core.config import GenerationConfig, ModelConfig
from fluid_core.model.fluid import FluidModel
from fluid_core.workflow.stage import file_sha256

FORMAT_VERSION = 1
MAX_SHARD_BYTES = 5_000_000_000


def write_bundle(
    path: str | Path,
    model: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    generation: GenerationConfig,
    image_tokenizer: Any,
    text_encoder: Any,
    latent_mean: list[float] | None,
    latent_std: list[float] | None,
    readme: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a bundle. `weights` is consumed one tensor at a time; at most one shard is held in memory.

    The encoders are `ImageTokenizer` and `TextEncoder`: one that was loaded from a hub id at a revision is referenced by
    that, another is copied into the bundle. The folder appears complete or not at all.

    Raises:
        ValueError: `path` exists and is not an empty folder, or weights are missing, unknown or of a wrong shape.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists: give a new folder for the bundle")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _write_weights(work, model, weights, max_shard_bytes)
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": model.model_dump(mode="json"),
            "generation": generation.model_dump(mode="json"),
            "image_tokenizer": _place_encoder(work, "image_tokenizer", image_tokenizer),
            "text_encoder": _place_encoder(work, "text_encoder", text_encoder),
        }
        config["image_tokenizer"]["kind"] = image_tokenizer.kind
        config["text_encoder"]["max_tokens"] = text_encoder.max_tokens
        config["text_encoder"]["dtype"] = "bf16" if text_encoder.dtype == torch.bfloat16 else "fp32"
        _write_json(work / "config.json", config)
        if latent_mean is not None and latent_std is not None:
            _write_json(work / "latent_stats.json", {"mean": list(latent_mean), "std": list(latent_std)})
        (work / "README.md").write_text(readme or _plain_card(model))
        write_manifest(work)
        if path.exists():
            path.rmdir()
        os.replace(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def write_manifest(folder: str | Path) -> None:
    """(Re)write manifest.json: call it after a file of the bundle was changed, for example its README.md."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json")
    _write_json(folder / "manifest.json", {p.relative_to(folder).as_posix(): file_sha256(p) for p in files})


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a bundle.

    Raises:
        ValueError: not a bundle, or of a format that this version does not read.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model bundle: it has no config.json")
    config = _read_json(folder / "config.json")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: format_version {version!r} is not {FORMAT_VERSION}: it was written by another version of Fluid"
        )
    return config


def verify_bundle(path: str | Path) -> None:
    """Compare every file with manifest.json.

    Raises:
        ValueError: with the first file that is missing or changed.
    """
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} has no manifest.json: the bundle was not written to its end")
    listed = _read_json(folder / "manifest.json")
    for file in folder.glob("model-*.safetensors"):
        if file.name not in listed:
            raise ValueError(f"{file} is not in the manifest.json beside it: remove it, its weights would be mixed in")
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its manifest.json lists")
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is not the file that manifest.json describes: copy the bundle again")


def load_model(path: str | Path) -> FluidModel:
    """The model of a bundle with its weights, fp32 or as stored, on CPU, in eval mode. Loading is strict."""
    folder = Path(path)
    with torch.device("meta"):
        model = FluidModel(ModelConfig.model_validate(read_config(folder)["model"]))
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = {}
    for name, tensor in _read_weights(folder):
        _check_weight(name, tensor, wanted, str(folder))
        if name in state:
            raise ValueError(f"{folder}: {name} is in two of the model-*.safetensors: copy the bundle again")
        state[name] = tensor
    _check_complete(state, wanted, str(folder))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def load_latent_stats(path: str | Path) -> tuple[list[float] | None, list[float] | None]:
    """(mean, std) for each latent channel, or (None, None) for discrete tokens."""
    file = Path(path) / "latent_stats.json"
    if not file.is_file():
        return None, None
    stats = _read_json(file)
    return stats["mean"], stats["std"]


def load_encoder(path: str | Path, name: str, device: str | torch.device) -> Any:
    """The bundle's `image_tokenizer` or `text_encoder`, checked against the hash that the bundle was made with."""
    from fluid_core.encoders.image import ImageTokenizer
    from fluid_core.encoders.text import TextEncoder

    section = dict(read_config(path)[name])
    sha256, revision = section.pop("sha256", None), section.pop("revision", None)
    inside = Path(path) / section["path"]
    where = str(inside) if revision is None else section["path"]
    load = ImageTokenizer.from_pretrained if name == "image_tokenizer" else TextEncoder.from_pretrained
    settings = {key: value for key, value in section.items() if key != "path"}
    encoder: Any = load(where, revision=revision, device=device, **settings)
    if sha256 is not None and revision is not None and encoder.identity()["sha256"] != sha256:
        raise ValueError(f"{name} {where} at {revision} is not the one that the bundle {path} was made with: its hash differs")
    return encoder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged, copy the bundle again: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged, copy the bundle again: not a JSON object")
    return value


def _place_encoder(folder: Path, name: str, encoder: Any) -> dict[str, Any]:
    identity = encoder.identity()
    if identity.get("revision"):
        return {"path": identity["path"], "revision": identity["revision"], "sha256": identity["sha256"]}
    encoder.save_pretrained(folder / name)
    return {"path": name, "sha256": identity.get("sha256")}


def _write_weights(folder: Path, config: ModelConfig, weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in FluidModel(config).named_parameters()}
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = seen_bytes = 0

    def flush() -> None:
        nonlocal held, seen_bytes
        if held:
            shards.append(list(held))
            save_file(held, folder / f"model-{len(shards):05d}.safetensors")
            held, seen_bytes = {}, 0

    seen: set[str] = set()
    for name, tensor in weights:
        _check_weight(name, tensor, wanted, "the weights")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weight {name} holds NaN or infinite values: this checkpoint is broken")
        size = tensor.numel() * tensor.element_size()
        if seen_bytes + size > max_bytes:
            flush()
        held[name] = tensor.detach().cpu().contiguous()
        seen_bytes, total = seen_bytes + size, total + size
        seen.add(name)
    flush()
    _check_complete(seen, wanted, "the weights")
    if len(shards) > 1:
        places = {name: f"model-{i + 1:05d}.safetensors" for i, names in enumerate(shards) for name in names}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model-*.safetensors")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def _check_weight(name: str, tensor: Tensor, wanted: dict[str, tuple[int, ...]], where: str) -> None:
    if name not in wanted:
        raise ValueError(f"{where}: {name} is not a parameter of this model; does its config.json fit?")
    if tuple(tensor.shape) != wanted[name]:
        raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, the model's is {wanted[name]}")


def _check_complete(names: Iterable[str], wanted: dict[str, tuple[int, ...]], where: str) -> None:
    missing = sorted(wanted.keys() - set(names))
    if missing:
        raise ValueError(f"{where}: {len(missing)} parameters are missing, the first is {missing[0]}")


def _plain_card(model: ModelConfig) -> str:
    return f"""# Fluid, {model.preset}

A text-to-image model: {model.tokens} tokens in {model.order} order, {model.grid}x{model.grid} of them.

```python
from fluid_core.generation.pipeline import FluidPipeline

pipe = FluidPipeline.from_pretrained("this folder")
pipe(["a red circle"], seed=0)[0].save("out.png")
```
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
