"""`encode`: image-text shards to Parquet."""

from typing import Literal

from pydantic import Field

from fluid_core.config.base import Section


class TextStorageConfig(Section):
    mode: Literal["embeddings", "tokens"] = "embeddings"
    dtype: Literal["bf16", "int8"] = "bf16"


class EncodeConfig(Section):
    output: str
    validation_output: str | None = None
    text: TextStorageConfig = TextStorageConfig()
    flip: bool = Field(False, description="store the moments of the mirrored image too")
    buckets: bool = Field(False, description="aspect-ratio buckets instead of the centre crop")
    decode_workers: int = Field(1, gt=0, description="parallel tasks that read, filter and decode; one CPU each")
    encode_workers: int = Field(1, gt=0, description="actors that hold the two encoders")
    commit_workers: int = Field(1, gt=0, description="actors that write and commit shards")
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(
        0, ge=0, description="torch threads of an encode worker on CPU; 0: the machine's cores / workers"
    )
    decode_memory_mib: int = Field(512, gt=0, description="heap memory that Ray reserves for a decode task")
    encode_memory_mib: int = Field(2048, gt=0, description="heap memory that Ray reserves for an encode worker")
    scratch: str | None = Field(
        None, description="folder for unfinished files; default: beside a local output, else the temp folder"
    )
    batch_size: int = Field(64, gt=0)
    precision: Literal["bf16", "fp32"] = "fp32"
    rows_per_group: int = Field(1024, gt=0)
    max_shard_samples: int = Field(65536, gt=0, description="larger input shards are split by member range")
    max_bad_ratio: float = Field(0.5, ge=0, le=1, description="a shard with more quarantined samples is set aside whole")
