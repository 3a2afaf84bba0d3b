"""Writes one shard of an encoded data set: the latents file, the text sidecar with the same row order, the quarantine file."""

import base64
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fluid_core.latents.manifest import SCHEMA_VERSION
from fluid_core.latents.schema import QUARANTINE_SCHEMA, TEXT_SCHEMA, latents_schema

ZSTD_LEVEL = 1


def tensor_bytes(values_N: Tensor) -> list[bytes]:
    """Each item's little-endian bytes of a contiguous CPU tensor (N, ...) of bfloat16 or int32."""
    flat = values_N.detach().to("cpu").contiguous()
    raw = flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
    size = raw[0].nbytes if len(raw) else 0
    data = raw.tobytes()
    return [data[i * size : (i + 1) * size] for i in range(len(raw))]


class RowGroupWriter:
    """A Parquet file written group by group in a fixed layout, so that the same rows give the same bytes.

    Encoded columns (`moments`, `codes`, `embeddings`) are compressed with zstd and get no dictionary and no statistics.
    """

    PLAIN = (
        "moments",
        "moments_flip",
        "codes",
        "codes_flip",
        "token_ids.list.element",
        "embeddings.list.element",
        "sha256",
        "key",
    )

    def __init__(self, path: Path, schema: pa.Schema, metadata: dict[str, str] | None = None):
        """`metadata` goes into the file under `fluid.<key>`; None keeps what the schema carries."""
        if metadata is not None:
            schema = schema.with_metadata({f"fluid.{key}": value for key, value in sorted(metadata.items())})
        self.schema = schema
        leaves = [name for name in schema.names if not pa.types.is_list(schema.field(name).type)]
        leaves += [f"{name}.list.element" for name in schema.names if pa.types.is_list(schema.field(name).type)]
        self.row_groups: list[int] = []
        self._writer = pq.ParquetWriter(
            path,
            self.schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=[name for name in leaves if name not in self.PLAIN],
            write_statistics=[name for name in leaves if name in ("key", "width", "height")],
            store_schema=True,
            data_page_size=1 << 20,
        )

    def write_group(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """One row group from equally long columns."""
        arrays = {field.name: pa.array(columns[field.name], type=field.type) for field in self.schema}
        self.write_table(pa.table(arrays, schema=self.schema))

    def write_table(self, table: pa.Table) -> None:
        """One row group from a table with this writer's columns."""
        self._writer.write_table(table.cast(self.schema), row_group_size=max(table.num_rows, 1))
        self.row_groups.append(table.num_rows)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Let go of an unfinished file that nobody will read; on a full disk its footer cannot be written."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
        self._writer.is_open = False  # or pyarrow tries again when the object goes, and prints that it failed


def latents_writer(path: Path, kind: str, flip: bool, metadata: dict[str, str]) -> RowGroupWriter:
    return RowGroupWriter(path, latents_schema(kind, flip), {"schema_version": str(SCHEMA_VERSION), **metadata})


def text_writer(path: Path, metadata: dict[str, str]) -> RowGroupWriter:
    return RowGroupWriter(path, TEXT_SCHEMA, {"schema_version": str(SCHEMA_VERSION), **metadata})


def write_quarantine(path: Path, records: Sequence[dict[str, str]]) -> None:
    """`records`: dicts of key, reason, detail, sha256."""
    columns = {name: [record.get(name, "") for record in records] for name in QUARANTINE_SCHEMA.names}
    pq.write_table(pa.table(columns, schema=QUARANTINE_SCHEMA), path, compression="zstd")


def null_text(token_ids: Sequence[int], embedding_LE: Tensor | None) -> dict[str, Any]:
    """The manifest's `null_text`: the empty caption, stored once for classifier-free guidance."""
    value: dict[str, Any] = {"token_ids": list(token_ids)}
    if embedding_LE is not None:
        raw = embedding_LE.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        value["embedding"] = base64.b64encode(raw).decode()
    return value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
