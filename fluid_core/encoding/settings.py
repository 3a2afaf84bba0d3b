"""What every worker of an encoding run needs to know; the part of it that the output depends on is hashed."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fluid_core.config import Recipe, config_hash
from fluid_core.config.data import FilterConfig
from fluid_core.data.decode import DecodeOptions, bucket_sizes
from fluid_core.data.filters import OptOut, resolve_preset
from fluid_core.encoders.source import weights_sha256

CHUNK_BYTES = 32 << 20
MAX_BATCHES_PER_CHUNK = 8


@dataclass(frozen=True)
class EncoderFacts:
    """Read from the encoders' folders without loading weights."""

    image: dict[str, Any]
    text: dict[str, Any]
    stride: int
    latent_channels: int
    vocabulary: int


@dataclass(frozen=True)
class EncodeSettings:
    """Pickled to the workers."""

    kind: Literal["kl", "vq"]
    image_size: int
    filters: FilterConfig
    caption_fields: tuple[str, ...]
    opt_out_digest: str
    text_mode: Literal["embeddings", "tokens"]
    text_dtype: Literal["bf16", "int8"]
    flip: bool
    buckets: tuple[tuple[int, int], ...]
    batch_size: int
    precision: str
    rows_per_group: int
    max_shard_samples: int
    max_bad_ratio: float
    encoders: EncoderFacts
    # Not part of the hash: where and how fast, not what.
    image_path: str
    image_revision: str | None
    text_path: str
    text_revision: str | None
    text_max_tokens: int
    text_encoder_dtype: Literal["bf16", "fp32"]
    gpus_per_worker: float
    threads: int
    scratch: str | None

    @property
    def decode(self) -> DecodeOptions:
        f = self.filters
        return DecodeOptions(self.image_size, f.max_pixels, f.min_side, f.max_aspect, self.buckets)

    @property
    def chunk_samples(self) -> int:
        """Samples that travel and are encoded together: a function of the settings, so that results do not depend on timing."""
        batch_bytes = self.batch_size * 3 * self.image_size**2
        return self.batch_size * max(1, min(MAX_BATCHES_PER_CHUNK, CHUNK_BYTES // batch_bytes))

    @property
    def token_dtype(self) -> Literal["uint16", "int32"]:
        return "uint16" if self.encoders.vocabulary <= 1 << 16 else "int32"

    @property
    def latent_shape(self) -> list[int]:
        side = self.image_size // self.encoders.stride
        return [self.encoders.latent_channels, side, side] if self.kind == "kl" else [side, side]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the encoded bytes depend on, as plain JSON."""
        values = asdict(replace(self, filters=None))  # type: ignore[arg-type]
        where = (
            "image_path",
            "image_revision",
            "text_path",
            "text_revision",
            "gpus_per_worker",
            "threads",
            "scratch",
            "encoders",
        )
        for name in where:
            del values[name]
        filters = self.filters.model_dump(mode="json")
        filters["opt_out"] = self.opt_out_digest
        hashes = {"image": self.encoders.image["sha256"], "text": self.encoders.text["sha256"]}
        return json.loads(json.dumps({**values, "filters": filters, "chunk": self.chunk_samples, "encoders": hashes}))

    @property
    def hash(self) -> str:
        return config_hash(self.fingerprint())


def resolve_settings(recipe: Recipe) -> EncodeSettings:
    """Settings of a recipe, checked against the encoders' own config files.

    Raises:
        ValueError: an encoder that is not there, or an image size that its stride does not divide.
    """
    image, text, encode = recipe.image_tokenizer, recipe.text_encoder, recipe.encode
    # A branch of the hub may move while the run goes on: the workers load the commit that was found here.
    image_folder, image_commit = encoder_folder(image.path, image.revision, "image_tokenizer")
    text_folder, text_commit = encoder_folder(text.path, text.revision, "text_encoder")
    vae = json.loads((image_folder / "config.json").read_text())
    t5 = json.loads((text_folder / "config.json").read_text())
    wanted = {"kl": "AutoencoderKL", "vq": "VQModel"}[image.kind]
    if vae.get("_class_name", wanted) != wanted:
        raise ValueError(
            f"image_tokenizer: {image.path} holds a {vae['_class_name']}, but kind {image.kind!r} needs a {wanted}"
        )
    stride = math.isqrt(vae["in_channels"] // 3) * 2 ** (len(vae["block_out_channels"]) - 1)
    if recipe.data.image_size % stride:
        raise ValueError(f"data.image_size {recipe.data.image_size} is not a multiple of the image tokenizer's stride {stride}")
    facts = EncoderFacts(
        image={"path": image.path, "kind": image.kind, "revision": image_commit, "sha256": weights_sha256(image_folder)},
        text={
            "path": text.path,
            "revision": text_commit,
            "sha256": weights_sha256(text_folder),
            "max_tokens": text.max_tokens,
            "width": t5["d_model"],
            "dtype": text.dtype,
        },
        stride=stride,
        latent_channels=vae["latent_channels"],
        vocabulary=t5["vocab_size"],
    )
    filters = resolve_preset(recipe.data.filters)
    return EncodeSettings(
        kind=image.kind,
        image_size=recipe.data.image_size,
        filters=filters,
        caption_fields=tuple(recipe.data.caption_fields),
        opt_out_digest=OptOut.read(filters.opt_out).digest,
        text_mode=encode.text.mode,
        text_dtype=encode.text.dtype,
        flip=encode.flip,
        buckets=bucket_sizes(recipe.data.image_size, 2 * stride) if encode.buckets else (),
        batch_size=encode.batch_size,
        precision=encode.precision,
        rows_per_group=encode.rows_per_group,
        max_shard_samples=encode.max_shard_samples,
        max_bad_ratio=encode.max_bad_ratio,
        encoders=facts,
        image_path=_absolute(image.path),
        image_revision=image_commit,
        text_path=_absolute(text.path),
        text_revision=text_commit,
        text_max_tokens=text.max_tokens,
        text_encoder_dtype=text.dtype,
        gpus_per_worker=encode.gpus_per_worker,
        threads=encode.threads_per_worker,
        scratch=str(Path(encode.scratch).resolve()) if encode.scratch else None,
    )


def encoder_folder(path: str, revision: str | None, what: str) -> tuple[Path, str | None]:
    """(the local folder of an encoder, its commit on the hub); a hub id is fetched into the hub's cache first.

    Raises:
        ValueError: neither a folder with a config.json nor a hub id that can be fetched.
    """
    local = Path(path)
    if (local / "config.json").is_file():
        return local, None
    parts = path.split("/")
    if local.is_dir() or len(parts) < 2 or path.startswith(("/", ".")):
        raise ValueError(f"{what}: {path} holds no encoder (no config.json); run the stage that makes it, or name a hub id")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
        patterns = [f"{'/'.join([*parts[2:], ''])}{pattern}" for pattern in wanted]
        snapshot = Path(snapshot_download("/".join(parts[:2]), revision=revision, allow_patterns=patterns))
        if not list(snapshot.joinpath(*parts[2:]).glob("*.safetensors")):  # older repositories, as google/t5-v1_1-xxl
            patterns = [f"{'/'.join([*parts[2:], ''])}*.bin"]
            snapshot_download("/".join(parts[:2]), revision=snapshot.name, allow_patterns=patterns)
    except Exception as error:  # the hub client raises a dozen kinds
        raise ValueError(
            f"{what}: folder {path} does not exist (`make demo` makes the demo's) and the hub did not give it: {str(error).splitlines()[0]}"
        ) from None
    folder = snapshot.joinpath(*parts[2:])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: {path} has no config.json on the hub; name the subfolder, as in organisation/name/vae")
    return folder, snapshot.name


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path
