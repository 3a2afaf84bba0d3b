"""Columns and file metadata of the encoded Parquet files.

bf16 values lie as little-endian bytes in a `binary` column, zstd, without dictionary: 5-9 times faster to read and write than
list or tensor columns, and half the size of int16 (Parquet stores that as INT32). shape and dtype are in the file's key-value
metadata, so plain pyarrow or DuckDB users can decode them: `numpy.frombuffer(value, "<u2")` are the bf16 bits.
"""

import pyarrow as pa

LATENT_COLUMNS = [
    pa.field("key", pa.string()),
    pa.field("sha256", pa.string()),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("crop", pa.list_(pa.int32())),  # left, top, right, bottom in the upright source image
    pa.field("latent_size", pa.list_(pa.int32())),  # H, W: the same for all rows of a row group
    pa.field("token_ids", pa.list_(pa.binary())),  # one per caption, little-endian manifest.token_dtype, with the final eos
    pa.field("metadata", pa.string()),
]
MOMENTS = pa.field("moments", pa.binary())  # bf16 (2C, H, W): mean, then log-variance, un-normalised
MOMENTS_FLIP = pa.field("moments_flip", pa.binary())  # of the mirrored image
CODES = pa.field("codes", pa.binary())  # int32 (H, W)
CODES_FLIP = pa.field("codes_flip", pa.binary())


def latents_schema(kind: str, flip: bool) -> pa.Schema:
    fields = [*LATENT_COLUMNS, MOMENTS if kind == "kl" else CODES]
    if flip:
        fields.append(MOMENTS_FLIP if kind == "kl" else CODES_FLIP)
    return pa.schema(fields)


TEXT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        # One value per caption, valid tokens only: bf16 (L, E), or int8 (L, E) followed by L float32 scales.
        pa.field("embeddings", pa.list_(pa.binary())),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("status", pa.string()),  # filtered, or quarantined
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("sha256", pa.string()),
    ]
)
