"""What travels between the operators: chunks of samples as bytes. A chunk follows from its shard and the settings alone.

read+decode  --DecodedChunk-->  encode  --EncodedChunk-->  commit
"""

import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class SampleRecord:
    """A decoded sample without its pixels."""

    key: str
    sha256: str
    captions: list[str]
    width: int
    height: int
    crop: tuple[int, int, int, int]
    metadata: str
    size: tuple[int, int]
    """(height, width) of its pixels."""


@dataclass
class Dropped:
    """A sample that is not encoded: status `filtered` or `quarantined`."""

    key: str
    status: str
    reason: str
    detail: str = ""
    sha256: str = ""


@dataclass
class DecodedChunk:
    """`pixels` holds the samples' RGB bytes one after another."""

    shard: dict[str, Any]
    output: str
    sequence: int
    last: bool
    samples: list[SampleRecord] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    failure: dict[str, str] | None = None
    """{"kind": "fatal" | "passing", "message"} when the shard cannot be read at all."""

    def to_row(self, pixels: list[NDArray[np.uint8]]) -> dict[str, list[Any]]:
        """One Ray Data row: the records pickled, the pixels as one value."""
        return {"chunk": [pickle.dumps(self)], "pixels": [b"".join([np.ascontiguousarray(p).data for p in pixels])]}

    @staticmethod
    def from_row(batch: Any) -> tuple["DecodedChunk", bytes]:
        """From a batch of one row (pyarrow table)."""
        return pickle.loads(batch["chunk"][0].as_py()), batch["pixels"][0].as_buffer()


@dataclass
class EncodedChunk:
    """Columns of the samples in order, ready for the Parquet files."""

    shard: dict[str, Any]
    output: str
    sequence: int
    last: bool
    samples: list[SampleRecord]
    dropped: list[Dropped]
    latents: list[bytes]
    latents_flip: list[bytes] | None
    token_ids: list[list[bytes]]
    text: list[list[bytes]] | None
    captions_cut: int = 0
    cosines: list[float] = field(default_factory=list)
