"""Deterministic reading of an encoded data set: by row group, straight from the manifest, without listing or footers of others.

    dataset = EncodedDataset("runs/demo/encoded/train")
    rows = dataset.read_group(shard_index=0, group_index=0)
    rows.moments      # bfloat16 (n, 2C, H, W)

Shapes: n rows of the group, C latent channels, H W latent height and width, L tokens of a caption, E text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluid_core.data.storage import Storage, open_storage
from fluid_core.latents.manifest import Manifest, Shard
from fluid_core.latents.text import unpack_embedding

ChooseCaption = Callable[[str, int], int]
"""(key, number of captions) -> index of the one to read."""


@dataclass
class Rows:
    """The rows of one row group. `captions`, `token_ids` and `text` hold one caption a row: the first, or the chosen one."""

    keys: list[str]
    captions: list[str]
    metadata: list[str]
    moments: Tensor | None
    moments_flip: Tensor | None
    codes: Tensor | None
    codes_flip: Tensor | None
    token_ids: list[np.ndarray[Any, Any]]
    text: list[Tensor] | None

    def __len__(self) -> int:
        return len(self.keys)


class EncodedDataset:
    """Reads `<root>` (local folder or s3://); see docs/encoding.md for the layout.

    `source` keeps the shards that came from one entry of data.sources (a glob over those entries).

    Raises:
        ValueError: no or unknown manifest, or no shard of that source; in `read_group`, a file that is not the one the manifest describes.
    """

    def __init__(self, root: str, source: str | None = None):
        self.root, self.source = str(root), source
        self.storage: Storage = open_storage(self.root)
        text = self.storage.read_or_none("manifest.json")
        if text is None:
            raise ValueError(f"{self.root} has no manifest.json: run pipelines/encode_dataset.py to the end first")
        self.manifest = Manifest.parse(text, f"{self.root}/manifest.json")
        self._open: dict[str, pq.ParquetFile] = {}
        if not self.row_groups and source is not None:
            known = sorted({shard.source for shard in self.manifest.shards})
            raise ValueError(f"{self.root} has no shard from source {source!r}; it has {', '.join(known)}")

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.row_groups)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], state["source"])  # type: ignore[misc]

    @property
    def row_groups(self) -> list[tuple[int, int, int]]:
        """(shard_index, group_index, rows) of every row group, in manifest order."""
        return [
            (s, g, rows)
            for s, shard in enumerate(self.manifest.shards)
            if self.source is None or fnmatch(shard.source, self.source)
            for g, rows in enumerate(shard.row_groups)
        ]

    def latent_size(self, shard_index: int, group_index: int) -> tuple[int, int]:
        """Latent (H, W) of a row group: the same for all unless the data set has aspect-ratio buckets."""
        shapes = self.manifest.shards[shard_index].shapes
        height, width = shapes[group_index] if shapes else self.manifest.latent_shape[-2:]
        return height, width

    def read_group(
        self,
        shard_index: int,
        group_index: int,
        columns: Sequence[str] | None = None,
        choose_caption: ChooseCaption | None = None,
    ) -> Rows:
        """Read one row group.

        Args:
            columns: of "key", "captions", "metadata", "moments", "moments_flip", "codes", "codes_flip", "token_ids", "text";
                None reads all there are. Columns left out come back empty or None.
            choose_caption: picks one of several captions of a row; the first by default.
        """
        table = self.read_table(shard_index, group_index, columns)
        return self.rows_of(table, self.latent_size(shard_index, group_index), choose_caption)

    def read_table(self, shard_index: int, group_index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group as it is stored, with all captions of a row; `columns` as in `read_group`, "text" is `embeddings`."""
        shard = self.manifest.shards[shard_index]
        wanted = set(columns) if columns is not None else None
        latents = self._file(f"latents/{shard.id}.parquet", shard, shard.bytes)
        names = [n for n in latents.schema_arrow.names if wanted is None or n in wanted or n in ("key", "captions")]
        table = latents.read_row_group(group_index, columns=names, use_threads=False)
        latents_name = self._name(f"latents/{shard.id}.parquet")
        rows = shard.row_groups[group_index]
        if table.num_rows != rows:
            raise ValueError(f"{latents_name}: row group {group_index} has {table.num_rows} rows, manifest says {rows}")
        if self.manifest.text_mode == "embeddings" and (wanted is None or "text" in wanted):
            name = f"text/{shard.id}.parquet"
            text = self._file(name, shard, shard.text_bytes).read_row_group(group_index, use_threads=False)
            if not text["key"].equals(table["key"]):
                raise ValueError(f"{self._name(name)}: keys of row group {group_index} are not those of the latents file")
            table = table.append_column("embeddings", text["embeddings"])
        return table

    def rows_of(self, table: pa.Table, latent_size: tuple[int, int], choose_caption: ChooseCaption | None = None) -> Rows:
        """What a table of `read_table`, or some of its rows, holds; `latent_size` is (H, W)."""
        keys = table["key"].to_pylist()
        chosen = np.zeros(len(keys), dtype=np.int64)
        if choose_caption:
            counts = pc.list_value_length(table["captions"]).to_pylist()
            chosen[:] = [choose_caption(key, count) for key, count in zip(keys, counts, strict=True)]
        height, width = latent_size

        def tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
            return stack_column(table[name], dtype, shape) if name in table.column_names else None

        moment_shape = (2 * self.manifest.latent_shape[0], height, width)
        codes, codes_flip = (tensor(name, torch.int32, (height, width)) for name in ("codes", "codes_flip"))
        token_dtype = self.manifest.numpy_token_dtype()
        token_ids: list[np.ndarray[Any, Any]] = []
        if "token_ids" in table.column_names:
            token_ids = [np.frombuffer(v, dtype=token_dtype) for v in _pick(table["token_ids"], chosen)]
        text = None
        if "embeddings" in table.column_names:
            text_width, dtype = int(self.manifest.encoders["text"]["width"]), self.manifest.text_dtype
            text = [unpack_embedding(value, text_width, dtype) for value in _pick(table["embeddings"], chosen)]
        return Rows(
            keys=keys,
            captions=_pick(table["captions"], chosen),
            metadata=table["metadata"].to_pylist() if "metadata" in table.column_names else [],
            moments=tensor("moments", torch.bfloat16, moment_shape),
            moments_flip=tensor("moments_flip", torch.bfloat16, moment_shape),
            codes=codes.long() if codes is not None else None,
            codes_flip=codes_flip.long() if codes_flip is not None else None,
            token_ids=token_ids,
            text=text,
        )

    def _name(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _file(self, name: str, shard: Shard, expected_bytes: int) -> pq.ParquetFile:
        if name not in self._open:
            size = self.storage.size_or_none(name)
            if size != expected_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{self._name(name)} {found}, the manifest says {expected_bytes}: copy it again or encode again"
                )
            if len(self._open) >= 64:  # a shuffle window touches many shards; keep descriptors bounded
                self._open.pop(next(iter(self._open))).close()
            try:
                file = pq.ParquetFile(self.storage.open_input(name), memory_map=False, pre_buffer=False)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{self._name(name)} is not a whole Parquet file ({error}): encode its shard again") from None
            if file.metadata.num_rows != shard.rows:
                raise ValueError(f"{self._name(name)} has {file.metadata.num_rows} rows, the manifest says {shard.rows}")
            self._open[name] = file
        return self._open[name]


def stack_column(column: pa.ChunkedArray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A binary column whose values all have one length, as a tensor (n, *shape).

    A column of one chunk, as a row group is read, is not copied: the tensor lies over Arrow's buffer, which it keeps alive.
    Do not write into it: other tensors, and other processes where the table comes from Ray, may hold the same memory.
    """
    parts = [_chunk_bytes(chunk) for chunk in column.chunks if len(chunk)]
    flat = parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *parts])
    return flat.view(dtype).reshape(len(column), *shape)


def _chunk_bytes(chunk: pa.Array) -> Tensor:
    """uint8 over the bytes of a binary array without nulls; its values lie one after another."""
    _, offset_buffer, data = chunk.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)
    first, last = int(offsets[chunk.offset]), int(offsets[chunk.offset + len(chunk)])
    return torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), last - first, [None, data.slice(first)]))


def _pick(column: pa.ChunkedArray, chosen: NDArray[np.int64]) -> list[Any]:
    """From a column of lists, the chosen value of each row."""
    picked: list[Any] = []
    for chunk in column.chunks:
        lengths = pc.list_value_length(chunk).to_numpy()
        starts = np.cumsum(lengths) - lengths
        wanted = starts + chosen[len(picked) : len(picked) + len(chunk)]
        picked.extend(chunk.flatten().take(pa.array(wanted)).to_pylist())
    return picked
