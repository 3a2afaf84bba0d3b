"""What the readers yield: a sample with its bytes, or the reason why there is none."""

import json
from dataclasses import dataclass, field
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_EXTENSIONS = ("txt", "caption", "text")


@dataclass
class RawSample:
    """One image-text pair as it lies in the source; the image is not decoded."""

    key: str
    image: bytes
    captions: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rejected:
    """A sample (or a defect of the shard itself) that cannot be used: it goes to the quarantine file."""

    key: str
    reason: str
    detail: str = ""
    sha256: str = ""


def captions_from(values: dict[str, Any], fields: list[str]) -> list[str]:
    """Captions under the named fields of a metadata record; each may be a string or a list of strings."""
    found: list[str] = []
    for name in fields:
        value = values.get(name)
        found.extend([value] if isinstance(value, str) else [v for v in value or [] if isinstance(v, str)])
    return found


def distinct(captions: list[str]) -> list[str]:
    """Stripped, non-empty, each once, in order."""
    return list(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))


def finish_sample(
    key: str, image: bytes, captions: list[str], metadata: dict[str, Any], caption_fields: tuple[str, ...]
) -> RawSample | Rejected:
    """Common end of all readers: collect the captions, refuse what has none.

    Captions are those given, then those under `caption_fields` of the metadata; without any, `caption` or `captions` there.
    """
    texts = distinct(captions + captions_from(metadata, list(caption_fields)))
    texts = texts or distinct(captions_from(metadata, ["caption", "captions"]))
    return RawSample(key, image, texts, metadata) if texts else Rejected(key, "missing_caption")


def parse_metadata(data: bytes) -> dict[str, Any] | None:
    """A JSON object, or None. One with half of a surrogate pair (as \\ud83d alone) is none: it cannot be written as UTF-8."""
    try:
        values = json.loads(data)
        if b"\\ud" in data.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
