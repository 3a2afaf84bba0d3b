"""Filters: each is a line of config, and each counts what it drops under a reason of its own.

Filters on metadata, captions, opt-out and duplicates run before an image is decoded; those on the image's size after its
header is read (fluid_core/data/decode.py).
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_core.config.data import FilterConfig, MetadataThreshold
from fluid_core.data.samples import RawSample


def resolve_preset(config: FilterConfig) -> FilterConfig:
    """`datacomp_basic` (DataComp, arXiv 2304.14108, appendix): smaller side at least 200, aspect at most 3, more than two words
    and five characters. Its fastText language filter is replaced by the share of ASCII letters. Stricter settings stay."""
    if config.preset == "none":
        return config
    return config.model_copy(
        update={
            "min_side": max(config.min_side, 200),
            "max_aspect": min(config.max_aspect or 3.0, 3.0),
            "min_caption_words": max(config.min_caption_words, 3),
            "min_caption_chars": max(config.min_caption_chars, 6),
            "min_ascii_letters": max(config.min_ascii_letters, 0.5),
        }
    )


def image_sha256(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


@dataclass(frozen=True)
class OptOut:
    """Keys, URLs and hashes that their owners do not want to see used."""

    entries: frozenset[str]

    @classmethod
    def read(cls, path: str | None) -> "OptOut":
        """One entry a line; blank lines and lines that start with # are skipped. Raises ValueError when the file is missing."""
        if path is None:
            return cls(frozenset())
        if not Path(path).is_file():
            raise ValueError(
                f"opt-out list {path} does not exist; create it (keys, URLs or sha256, one a line) or name another"
            )
        lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
        return cls(frozenset(line for line in lines if line and not line.startswith("#")))

    def holds(self, key: str, sha256: str, metadata: dict[str, Any]) -> bool:
        urls = [url for url in (metadata.get("url"), metadata.get("URL")) if isinstance(url, str)]
        return not self.entries.isdisjoint((key, sha256, *urls))

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.entries)).encode()).hexdigest()[:16]


class SampleFilter:
    """The filters that need no pixels."""

    def __init__(self, config: FilterConfig, opt_out: OptOut):
        self.config = config
        self.opt_out = opt_out
        self._pattern = re.compile(config.caption_pattern) if config.caption_pattern else None

    def reason(self, sample: RawSample, sha256: str) -> str | None:
        """Why the sample is dropped, or None; removes the captions that the caption rules refuse.

        Raises:
            ValueError: a threshold's column is absent and its policy is `fail`.
        """
        if self.opt_out.holds(sample.key, sha256, sample.metadata):
            return "opt_out"
        for threshold in self.config.thresholds:
            reason = self._threshold(threshold, sample)
            if reason is not None:
                return reason
        reasons = [self.caption_reason(caption) for caption in sample.captions]
        if all(reasons):
            return reasons[0]
        sample.captions = [caption for caption, refused in zip(sample.captions, reasons, strict=True) if refused is None]
        return None

    def caption_reason(self, caption: str) -> str | None:
        config = self.config
        if len(caption.split()) < config.min_caption_words:
            return "caption_too_few_words"
        if len(caption) < config.min_caption_chars:
            return "caption_too_short"
        if config.max_caption_chars is not None and len(caption) > config.max_caption_chars:
            return "caption_too_long"
        if config.min_ascii_letters > 0:
            letters = sum(c == " " or (c.isascii() and c.isalpha()) for c in caption)
            if letters < config.min_ascii_letters * len(caption):
                return "caption_characters"
        if self._pattern is not None and not self._pattern.search(caption):
            return "caption_pattern"
        return None

    def _threshold(self, threshold: MetadataThreshold, sample: RawSample) -> str | None:
        value = sample.metadata.get(threshold.column)
        number = None
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = None
        if number is None or number != number:
            if threshold.missing == "fail":
                raise ValueError(
                    f"sample {sample.key} has no number under {threshold.column!r}: "
                    f"set `missing: keep` or `missing: drop` on this threshold of data.filters"
                )
            return f"missing_{threshold.column}" if threshold.missing == "drop" else None
        too_low = threshold.minimum is not None and number < threshold.minimum
        too_high = threshold.maximum is not None and number > threshold.maximum
        return f"threshold_{threshold.column}" if too_low or too_high else None


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Counts by reason, sorted by name."""
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))
