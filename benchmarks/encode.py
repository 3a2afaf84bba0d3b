"""Encoding: the pipeline against the bare encoders, decoding against plain Pillow, bytes a pair, Parquet speed, driver memory.

    python -m benchmarks.run encode
    FLUID_BENCH_FULL=1 python -m benchmarks.run encode      with the real SD-VAE architecture at 256 px, and 1,000 shards

Both sides of each ratio are measured in one run, on the same data, with the same number of threads.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image

from fluid_core.config import StandInT5Config, load_recipe
from fluid_core.data.decode import DecodeOptions, decode_image
from fluid_core.data.shard_writer import ShardSample, write_shards
from fluid_core.encoders.stand_in import count_words, create_stand_in_t5
from fluid_core.encoding.chunks import DecodedChunk
from fluid_core.encoding.committer import Committer
from fluid_core.encoding.encode import Encode
from fluid_core.encoding.read_decode import ReadDecode
from fluid_core.encoding.run import prepare_output
from fluid_core.encoding.settings import resolve_settings
from fluid_core.latents.manifest import Manifest, Shard
from fluid_core.latents.reader import EncodedDataset
from fluid_core.latents.text import pack_embedding
from fluid_core.latents.writer import latents_writer, tensor_bytes, text_writer

FULL = bool(os.environ.get("FLUID_BENCH_FULL"))
WORDS = "a red green blue small large round photo of cat dog house tree car beside under over with two three old new".split()  # noqa: SIM905
Row = dict[str, Any]


def rows() -> list[Row]:
    """Measurements for `make bench`: dicts of name, ours, reference, ratio, unit, target."""
    found = [*decoding(), *parquet(), *text_size()]
    with tempfile.TemporaryDirectory(prefix="fluid-bench-") as folder:
        found += pipeline(Path(folder), "demo VAE, 64 px", _demo_vae, 64, 8192, 64, 256)
    if FULL:
        with tempfile.TemporaryDirectory(prefix="fluid-bench-") as folder:
            found += pipeline(Path(folder), "SD-VAE, 256 px", _sd_vae, 256, 96, 4, 4)
        found.append(driver_memory())
    return found


def _run(command: list[str]) -> str:
    """Standard output of a command; its last lines when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _row(name: str, ours: float, reference: float, unit: str, target: str) -> Row:
    ratio = ours / reference if reference else None
    return {"name": name, "ours": ours, "reference": reference, "ratio": ratio, "unit": unit, "target": target}


def _caption(rng: np.random.Generator) -> str:
    """As long as alternative texts on the web are: about 10 words."""
    return " ".join(rng.choice(WORDS, int(np.clip(rng.poisson(10), 3, 40))))


def _picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Smooth with some grain: compresses about as photographs do."""
    small = Image.fromarray(rng.integers(0, 256, (size // 32 + 2, size // 32 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def _samples(count: int, size: int) -> Iterator[ShardSample]:
    rng = np.random.default_rng(0)
    pool = []
    for _ in range(64):
        buffer = io.BytesIO()
        _picture(rng, size).save(buffer, "JPEG", quality=90)
        pool.append(buffer.getvalue())
    for i in range(count):
        sample = {
            "__key__": f"{i:08d}",
            "image_bytes": pool[i % 64],
            "extension": "jpg",
            "caption": _caption(rng),
            "metadata": {},
        }
        yield sample  # type: ignore[misc]


# Pipeline against the bare encoders.


def _demo_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        in_channels=48, out_channels=48, latent_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)  # fmt: skip


def _sd_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)  # fmt: skip


def pipeline(
    folder: Path, name: str, make_vae: Callable[[Path], None], size: int, count: int, batch: int, shard: int
) -> list[Row]:
    """images/s of the Ray pipeline once its workers are up, over the encoders alone on arrays in memory.

    One encode worker a core, and shards small enough that at the end no worker is idle for long. The encoders alone run both ways: one process with a thread a core, and one process a core.
    """
    torch.manual_seed(0)
    make_vae(folder / "vae")
    captions = [sample["caption"] for sample in _samples(min(count, 2048), 64)]
    create_stand_in_t5(count_words(captions), StandInT5Config(), folder / "t5", 0)
    write_shards(_samples(count, size), folder / "data", shard)
    cores = os.cpu_count() or 1
    recipe = {
        "name": "bench", "runs_dir": str(folder / "runs"),
        "data": {"image_size": size, "sources": [str(folder / "data")]},
        "image_tokenizer": {"path": str(folder / "vae")},
        "text_encoder": {"path": str(folder / "t5"), "max_tokens": 64, "dtype": "fp32"},
        "encode": {"output": str(folder / "out"), "batch_size": batch, "encode_workers": cores},
        "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bare = {"one process": (1, cores), "one process a core": (cores, 1)}
    command = [sys.executable, "pipelines/encode_dataset.py", "--config", str(folder / "recipe.yaml")]
    # Before and after, the better of the two: other work on the machine must not flatter the pipeline.
    before = {way: _bare_encoders(folder, size, count // 4, batch, *split) for way, split in bare.items()}
    _run(command)
    after = {way: _bare_encoders(folder, size, count // 4, batch, *split) for way, split in bare.items()}
    speed = json.loads((folder / "out/_throughput.json").read_text())["warm_images_per_second"]
    found = [
        _row(f"pipeline over bare encoders ({way}), {name}", speed, max(before[way], after[way]), "images/s", ">= 0.90")
        for way in bare
    ]
    return found + _breakdown(folder, name)


def _breakdown(folder: Path, name: str) -> list[Row]:
    """What the overhead is made of: CPU milliseconds an image in each part, one thread, against those of the encoders."""
    settings = replace(resolve_settings(load_recipe(folder / "recipe.yaml", [f"encode.output={folder / 'again'}"])), threads=1)
    output = prepare_output([str(folder / "data" / "00000.tar")], str(folder / "again"), settings, force=False)
    encode, committer = Encode(settings, [], [output.root]), Committer(settings)
    spent = {"read, filter, decode": 0.0, "VAE and T5": 0.0, "write and commit": 0.0}
    count, clock = 0, time.process_time()

    def lap(part: str) -> None:
        nonlocal clock
        now = time.process_time()
        spent[part] += now - clock
        clock = now

    for row in ReadDecode(settings).chunks({"shard": asdict(output.plan[0]), "output": output.root}):
        chunk, pixels = DecodedChunk.from_row(pa.table(row))
        lap("read, filter, decode")
        encoded = encode.encode(chunk, pixels)
        lap("VAE and T5")
        failure = committer.add(encoded)
        lap("write and commit")
        assert failure is None and chunk.failure is None, (failure, chunk.failure)
        count += len(chunk.samples)
    base = 1e3 * spent["VAE and T5"] / count
    parts = [(part, 1e3 * seconds / count) for part, seconds in spent.items()]
    return [_row(f"CPU of {part}, {name}", value, base, "ms/image", "") for part, value in parts]


def _bare_encoders(folder: Path, size: int, count: int, batch: int, processes: int, threads: int) -> float:
    """VAE and T5 in processes of their own, which start together: nothing is read, decoded or written."""
    code = f"""
import time, torch
from benchmarks.encode import _samples
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.text import TextEncoder
torch.set_num_threads({threads})
vae = ImageTokenizer.from_pretrained({str(folder / "vae")!r})
t5 = TextEncoder.from_pretrained({str(folder / "t5")!r}, max_tokens=64, dtype="fp32")
images = torch.rand({batch}, 3, {size}, {size}) * 2 - 1
captions = [sample["caption"] for sample in _samples({count}, 64)]
vae.encode(images); t5.encode(captions[:{batch}])
print(flush=True)
input()
start = time.perf_counter()
for first in range(0, {count}, {batch}):
    vae.encode(images)
t5.encode(captions)
print({count} / (time.perf_counter() - start))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdin and process.stdout and process.stdout.readline(), "a process with the bare encoders failed"
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0].split()[-1]) for process in running)


# Decoding.


def decoding() -> list[Row]:
    """images/s of one core: the guarded decoder against Pillow's open, convert, resize, crop."""
    found = []
    for side, repeats in ((384, 60), (768, 24), (1536, 8)):
        rng = np.random.default_rng(side)
        files = []
        for _ in range(4):
            buffer = io.BytesIO()
            _picture(rng, side).resize((side * 4 // 3, side)).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        options = DecodeOptions(image_size=256)
        ours = _rate(lambda data, o=options: decode_image(data, o), files, repeats)  # type: ignore[misc]
        plain = _rate(_plain_decode, files, repeats)
        found.append(_row(f"decode {side} px JPEG to 256 px", ours, plain, "images/s/core", ">= 1"))
    return found


def _plain_decode(data: bytes) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    return np.asarray(image.crop((left, top, left + 256, top + 256)))


def _rate(call: Callable[[bytes], Any], files: list[bytes], repeats: int) -> float:
    call(files[0])
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for i in range(repeats):
            call(files[i % len(files)])
        best = min(best, (time.process_time() - start) / repeats)
    return 1.0 / best


# Parquet.


def parquet() -> list[Row]:
    """MB/s of one core for the moments column (bf16, 32x16x16 a row), against numpy files of the same bytes."""
    moments = torch.randn(4096, 32, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    megabytes = moments.numel() * 2 / 1e6
    with tempfile.TemporaryDirectory(prefix="fluid-bench-") as folder:
        path = Path(folder, "latents/0.parquet")
        path.parent.mkdir()
        start = time.process_time()
        writer = latents_writer(path, "kl", False, {})
        for first in range(0, 4096, 1024):
            part = moments[first : first + 1024]
            n = len(part)
            same = {"sha256": "0" * 64, "captions": ["a caption"], "width": 256, "height": 256, "crop": [0, 0, 256, 256]}
            same |= {"latent_size": [16, 16], "token_ids": [b"\1\0"], "metadata": "{}"}
            columns: dict[str, list[Any]] = {name: [value] * n for name, value in same.items()}
            columns |= {"key": [f"{i:08d}" for i in range(n)], "moments": tensor_bytes(part)}
            writer.write_group(columns)
        writer.close()
        write = megabytes / (time.process_time() - start)
        raw = moments.view(torch.int16).numpy()
        start = time.process_time()
        np.save(Path(folder, "a.npy"), raw)
        plain_write = megabytes / (time.process_time() - start)
        shard = Shard(id="0", uri="", rows=4096, row_groups=writer.row_groups, bytes=path.stat().st_size, sha256="")
        manifest = Manifest(
            kind="kl", image_size=256, latent_shape=[16, 16, 16], encoders={}, latent_mean=[], latent_std=[],
            text_mode="tokens", text_dtype="bf16", token_dtype="uint16", null_text={}, counts={}, shards=[shard],
        )  # fmt: skip
        Path(folder, "manifest.json").write_text(manifest.dumps())
        read = max(_read_speed(folder, megabytes) for _ in range(5))
        start = time.process_time()
        torch.from_numpy(np.load(Path(folder, "a.npy"))).view(torch.bfloat16)
        plain_read = megabytes / (time.process_time() - start)
    return [
        _row("write latents, zstd Parquet over raw .npy", write, plain_write, "MB/s/core", ""),
        _row("read latents, zstd Parquet over raw .npy", read, plain_read, "MB/s/core", "ours >= 1000"),
    ]


def _read_speed(folder: str, megabytes: float) -> float:
    """As training reads: one row group after another to bfloat16 tensors."""
    start = time.process_time()
    dataset = EncodedDataset(folder)
    for shard, group, _ in dataset.row_groups:
        dataset.read_group(shard, group, ["moments"])
    return megabytes / (time.process_time() - start)


# Size.


def text_size(captions: int = 512, width: int = 4096, padding: int = 128) -> list[Row]:
    """Bytes a caption of T5-XXL's width on disk, against fp32 states padded to 128 tokens.

    Captions as long as alternative texts: about 10 words of 1.35 tokens and the end-of-sequence token. The states are normal
    random numbers, of which zstd saves a fifth.
    """
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    lengths = [round(1.35 * len(_caption(rng).split())) + 1 for _ in range(captions)]
    found = []
    for dtype in ("bf16", "int8"):
        with tempfile.TemporaryDirectory(prefix="fluid-bench-") as folder:
            writer = text_writer(Path(folder, "text.parquet"), {})
            states = [pack_embedding(torch.randn(length, width, generator=generator), dtype) for length in lengths]
            writer.write_group({"key": [f"{i:08d}" for i in range(captions)], "embeddings": [[state] for state in states]})
            writer.close()
            stored = Path(folder, "text.parquet").stat().st_size / captions
        name = f"text of {np.mean(lengths):.1f} tokens a caption, {dtype}, over fp32 padded to {padding}"
        found.append(_row(name, stored, 4.0 * width * padding, "bytes/caption", "<= 0.05"))
    return found


# Memory.


def driver_memory() -> Row:
    """Peak MiB of the pipeline's own process at 1,000 shards against 10 (2 samples each; workers are other processes)."""

    def peak(shards: int) -> float:
        with tempfile.TemporaryDirectory(prefix="fluid-bench-") as name:
            folder = Path(name)
            _demo_vae(folder / "vae")
            create_stand_in_t5(count_words(["a cat"]), StandInT5Config(), folder / "t5", 0)
            write_shards(_samples(2 * shards, 64), folder / "data", 2)
            recipe = {
                "name": "bench", "runs_dir": str(folder / "runs"), "data": {"image_size": 64, "sources": [str(folder / "data")]},
                "image_tokenizer": {"path": str(folder / "vae")},
                "text_encoder": {"path": str(folder / "t5"), "max_tokens": 64, "dtype": "fp32"},
                "encode": {"output": str(folder / "out")}, "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
            }  # fmt: skip
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            code = f"""
import resource
from fluid_core.config import load_recipe
from fluid_core.encoding.pipeline import encode_dataset
encode_dataset(load_recipe({str(folder / "recipe.yaml")!r}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
            return float(_run([sys.executable, "-c", code]).splitlines()[-1])

    return _row("peak memory of the driver, 1,000 shards against 10", peak(1000), peak(10), "MiB", "<= 1.1")
