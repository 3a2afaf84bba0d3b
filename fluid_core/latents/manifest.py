"""The manifest of an encoded data set: what it holds, which encoders made it, and every file with its hash.

It is a pure function of the ledger (fluid_core/encoding/ledger.py): two encoders that end at the same commits write the
same bytes.
"""

import base64
import hashlib
import json
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

SCHEMA_VERSION = 1


class Shard(BaseModel):
    """One input shard's output. `row_groups` are row counts, in file order; `rows` may be 0 (everything was dropped)."""

    model_config = ConfigDict(extra="forbid")

    id: str
    uri: str
    source: str = ""
    weight: float = 1.0
    rows: int
    row_groups: list[int]
    shapes: list[list[int]] | None = None
    """Aspect-ratio buckets only: latent [H, W] of each row group."""
    bytes: int
    """Size of the latents file."""
    sha256: str
    text_bytes: int = 0
    text_sha256: str | None = None
    quarantine_rows: int = 0
    set_aside: bool = False


class Manifest(BaseModel):
    """`<root>/manifest.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    kind: Literal["kl", "vq"]
    image_size: int
    latent_shape: list[int]
    """[C, H, W] of one image's latents (or [H, W] of its codes); with buckets, of the square bucket."""
    encoders: dict[str, dict[str, Any]]
    latent_mean: list[float]
    latent_std: list[float]
    """Per latent channel, of samples from the posterior: std^2 = Var(mean) + E[exp(logvar)]. Empty for vq."""
    flip: bool = False
    text_mode: Literal["embeddings", "tokens"]
    text_dtype: Literal["bf16", "int8"]
    token_dtype: Literal["uint16", "int32"]
    null_text: dict[str, Any]
    counts: dict[str, Any]
    """{"in": n, "out": n, "filtered": {reason: n}, "quarantined": {reason: n}}; in = out + filtered + quarantined."""
    settings: dict[str, Any] = {}
    settings_hash: str = ""
    histograms: dict[str, dict[str, int]] = {}
    text_cosine: dict[str, float] | None = None
    """int8 embeddings only: {"mean", "min"} cosine of stored against computed tokens."""
    duplicate_shards: list[dict[str, str]] = []
    shards: list[Shard]

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def null_embedding(self) -> Tensor:
        """The empty caption's embedding: bfloat16 of shape (L, E).

        Raises:
            ValueError: in a data set of tokens alone.
        """
        if "embedding" not in self.null_text:
            raise ValueError(
                "this data set holds token ids alone (text.mode: tokens): encode the empty caption with the text encoder"
            )
        raw = bytearray(base64.b64decode(self.null_text["embedding"]))
        return torch.frombuffer(raw, dtype=torch.bfloat16).reshape(len(self.null_text["token_ids"]), -1)

    def numpy_token_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.token_dtype == "uint16" else "<i4")

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "Manifest":
        """Raises ValueError naming `where` when the text is no manifest of a known schema version."""
        try:
            values = json.loads(text)
        except ValueError:
            raise ValueError(f"{where} is not valid JSON; was it copied completely?") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{where} has schema_version {version!r}; this Fluid reads {SCHEMA_VERSION}: encode the data again"
            )
        return cls.model_validate(values)

    def dumps(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
