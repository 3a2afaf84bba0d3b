"""Small encoders and shards, made by code: a KL VAE of stride 8, a ByT5 encoder of width 32, tars of coloured squares."""

import atexit
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image

from fluid_core.config import Recipe
from fluid_core.data.storage import open_storage
from fluid_core.encoding.chunks import DecodedChunk
from fluid_core.encoding.committer import Committer
from fluid_core.encoding.duplicates import HashShards, find_duplicates
from fluid_core.encoding.encode import Encode
from fluid_core.encoding.read_decode import ReadDecode
from fluid_core.encoding.run import finish_output, prepare_output
from fluid_core.encoding.settings import resolve_settings
from fluid_core.latents.manifest import Manifest

LOADING = threading.Lock()


@functools.cache
def encoders() -> tuple[Path, Path]:
    """(image tokenizer folder, text encoder folder), made once a process, deterministic."""
    from diffusers import AutoencoderKL
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    folder = Path(tempfile.mkdtemp(prefix="fluid-encoders-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=48, out_channels=48, latent_channels=4, block_out_channels=(16, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    t5 = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    T5EncoderModel(t5).save_pretrained(folder / "t5")
    ByT5Tokenizer().save_pretrained(folder / "t5")
    return folder / "vae", folder / "t5"


def image_bytes(seed: int, size: tuple[int, int] = (64, 64), format: str = "PNG", mode: str = "RGB") -> bytes:
    """A random blocky picture."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.NEAREST).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shards(folder: Path, shards: int, samples: int, first: int = 0) -> list[str]:
    """`shards` tars of `samples` samples each; returns all keys."""
    keys = []
    for s in range(shards):
        members = []
        for i in range(samples):
            number = first + s * samples + i
            keys.append(f"{number:06d}")
            members += sample_members(keys[-1], number)
        write_tar(folder / f"{s:05d}.tar", members)
    return keys


def sample_members(
    key: str, seed: int, caption: str | None = None, metadata: dict[str, Any] | None = None
) -> list[tuple[str, bytes]]:
    """Members of one sample."""
    caption = f"a picture of number {seed}" if caption is None else caption
    members = [(f"{key}.png", image_bytes(seed)), (f"{key}.txt", caption.encode())]
    return members + ([(f"{key}.json", json.dumps(metadata).encode())] if metadata is not None else [])


def recipe_values(folder: Path, sources: list[str], output: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe for the encode pipeline that keeps its records in `folder`; `sections` are merged into it."""
    image_tokenizer, text_encoder = encoders()
    values: dict[str, Any] = {
        "name": "test",
        "runs_dir": str(folder / "runs"),
        "data": {"image_size": 64, "sources": sources},
        "image_tokenizer": {"path": str(image_tokenizer), "kind": "kl"},
        "text_encoder": {"path": str(text_encoder), "max_tokens": 32, "dtype": "fp32"},
        "encode": {
            "output": str(output), "batch_size": 4, "rows_per_group": 8, "threads_per_worker": 1,
            "decode_memory_mib": 64, "encode_memory_mib": 256,
        },
        "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def write_recipe(path: Path, sources: list[str], output: Path | str, **sections: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe_values(path.parent, sources, output, **sections)))
    return path


def encode_here(recipe: Recipe, force: bool = False) -> list[Manifest]:
    """The encoding of a recipe without Ray: the same operators, called one after another in this process."""
    settings = dataclasses.replace(resolve_settings(recipe), threads=1)
    wanted = [(recipe.data.sources, recipe.encode.output)]
    if recipe.encode.validation_output:
        wanted.append((recipe.data.validation_sources, recipe.encode.validation_output))
    outputs = [prepare_output(sources, root, settings, force) for sources, root in wanted]
    committer, reader = Committer(settings), ReadDecode(settings)
    with LOADING:  # transformers does not load two models at a time in one process
        encode = Encode(settings, [], [output.root for output in outputs])
    for output in outputs:
        if settings.filters.deduplicate:
            for shard in output.plan:
                if not shard.duplicate_of:
                    HashShards(settings).hash_shard(shard, output.storage)
            find_duplicates(output.storage, output.plan, settings, recipe.encode)
        for shard in output.pending():
            for row in reader.chunks({"shard": dataclasses.asdict(shard), "output": output.root}):
                chunk, pixels = DecodedChunk.from_row(pa.table(row))
                failure = chunk.failure or committer.add(encode.encode(chunk, pixels))
                if failure is not None:
                    raise ValueError(failure["message"])
    return [finish_output(output, settings) for output in outputs]


def content(root: Path | str) -> dict[str, str]:
    """sha256 of every file of an output, local or on S3, that must be the same in two runs."""
    skip = {"_throughput.json", "plan.parquet"}  # speeds and modification times
    storage = open_storage(str(root))
    names = [o.name for o in storage.list() if o.name not in skip]
    return {name: hashlib.sha256(storage.read_or_none(name) or b"").hexdigest() for name in names}


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """A file system of so many KiB at `folder`; False, and an ordinary folder, where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
