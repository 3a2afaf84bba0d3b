"""Parquet shards: image bytes in a column (img2dataset's `parquet` format, Hugging Face data sets), or paths to images.

Columns are found by name. Bytes: one of jpg, jpeg, png, webp, image, image_bytes, img, bytes, content (binary, or a struct
with `bytes` and `path` as Hugging Face writes it). Paths: image_path, file_path, path, file_name, filename, image (string);
relative ones are looked for beside the Parquet file. Captions: caption, text, TEXT, captions, title. Keys: key, __key__, id,
image_id, else the row's number. All other plain columns become the sample's metadata.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fluid_core.data.samples import RawSample, Rejected, finish_sample
from fluid_core.data.storage import Storage, open_storage

BYTES_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "img", "bytes", "content")
PATH_COLUMNS = ("image_path", "file_path", "path", "file_name", "filename", "image")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "captions", "title")
KEY_COLUMNS = ("key", "__key__", "id", "image_id")
BATCH_ROWS = 64


def read_parquet(
    storage: Storage,
    name: str,
    scratch: Path,
    caption_fields: tuple[str, ...],
    max_image_bytes: int,
    start: int,
    stop: int | None,
) -> Iterator[RawSample | Rejected]:
    """Rows [start, stop) of a Parquet file as samples. A file without the columns it needs is one `schema_drift`."""
    path = storage.fetch(name, scratch)
    label = Path(name).name
    if path.stat().st_size == 0:
        yield Rejected(f"{label}#empty_shard", "empty_shard", "the file has no bytes")
        return
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        yield Rejected(f"{label}#not_parquet", "not_parquet", str(error)[:200])
        return
    image, is_path = _image_column(schema)
    caption = next((c for c in CAPTION_COLUMNS if c in schema.names), None)
    if image is None or (caption is None and not set(caption_fields) & set(schema.names)):
        missing = "image bytes or paths" if image is None else "captions"
        detail = f"no column of {missing} among {', '.join(schema.names)}"
        for row in range(start, min(stop or file.metadata.num_rows, file.metadata.num_rows)):
            yield Rejected(f"{label}#{row}", "schema_drift", detail)
        return
    key = next((c for c in KEY_COLUMNS if c in schema.names), None)
    plain = [f.name for f in schema if f.name not in (image, caption, key) and _is_plain(f.type)]
    columns = [c for c in (image, caption, key, *plain) if c is not None]
    row = 0
    seen: set[str] = set()
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
            if row + batch.num_rows <= start:
                row += batch.num_rows
                continue
            for values in _rows(batch):
                if not (start <= row and (stop is None or row < stop)):
                    pass
                elif values is None:
                    yield Rejected(f"{label}#{row}", "text_not_utf8", "a text of this row is not UTF-8")
                else:
                    own = values.pop(key) if key else None
                    sample_key = f"{label.removesuffix('.parquet')}-{row:08d}" if own is None else str(own)
                    if sample_key in seen:
                        yield Rejected(
                            sample_key, "duplicate_member", "the file holds this key more than once; the first counts"
                        )
                    else:
                        seen.add(sample_key)
                        yield _sample(
                            sample_key, values, image, caption, is_path, storage, name, caption_fields, max_image_bytes
                        )
                row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        total = file.metadata.num_rows if stop is None else min(stop, file.metadata.num_rows)
        for lost in range(max(row, start), total):
            yield Rejected(f"{label}#{lost}", "parquet_damaged", str(error)[:200])


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows, None in place of one whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


def _image_column(schema: pa.Schema) -> tuple[str | None, bool]:
    """(column, whether it holds paths)."""
    for name in BYTES_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name, False
    for name in PATH_COLUMNS:
        if name in schema.names and (
            pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)
        ):
            return name, True
    return None, False


def _is_plain(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    lists = pa.types.is_list(kind) and pa.types.is_string(kind.value_type)
    return text or lists or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _sample(
    key: str,
    values: dict[str, Any],
    image_column: str,
    caption_column: str | None,
    is_path: bool,
    storage: Storage,
    name: str,
    caption_fields: tuple[str, ...],
    max_image_bytes: int,
) -> RawSample | Rejected:
    value = values.pop(image_column)
    captions = values.pop(caption_column) if caption_column else None
    captions = [captions] if isinstance(captions, str) else [c for c in captions or [] if isinstance(c, str)]
    image = value.get("bytes") if isinstance(value, dict) else value
    if is_path and value:
        image = _read_path(storage, name, str(value))
        if image is None:
            return Rejected(key, "missing_image", f"{value} does not exist")
    if not image:
        status = values.get("status")
        if status is not None and status != "success":
            return Rejected(key, "failed_download", str(values.get("error_message") or status)[:200])
        return Rejected(key, "missing_image", "the row holds no image")
    if len(image) > max_image_bytes:
        return Rejected(key, "image_too_many_bytes", f"{len(image)} bytes")
    return finish_sample(key, image, captions, values, caption_fields)


def _read_path(storage: Storage, name: str, path: str) -> bytes | None:
    """An absolute path, an s3:// address, or a path beside the Parquet file; None for what is no file."""
    if ("://" in path and not path.startswith("s3://")) or "\0" in path:
        return None
    if path.startswith(("s3://", "/")):
        folder, _, base = path.rpartition("/")
        storage, path = open_storage(folder or "/"), base
    else:
        folder = name.rpartition("/")[0]
        path = f"{folder}/{path}" if folder else path
    try:
        return storage.read_or_none(path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise
