"""A folder of loose files as one shard: img2dataset's `files` format (`00000/000000001.jpg`, .txt and .json beside it)."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from fluid_core.data.samples import IMAGE_EXTENSIONS, RawSample, Rejected, finish_sample, parse_metadata
from fluid_core.data.storage import Storage


def read_files(
    storage: Storage, folder: str, caption_fields: tuple[str, ...], max_image_bytes: int
) -> Iterator[RawSample | Rejected]:
    """Samples of one folder (not of its subfolders), by key."""
    prefix = "" if folder == "." else f"{folder}/"
    names = [o.name for o in storage.list(prefix) if str(PurePosixPath(o.name).parent) == folder]
    texts = {name for name in names if name.endswith((".txt", ".json"))}
    images: dict[str, str] = {}
    for name in sorted(names):
        stem, _, extension = name.rpartition(".")
        if extension.lower() in IMAGE_EXTENSIONS:
            if stem in images:
                yield Rejected(stem.removeprefix(prefix), "duplicate_member", f"{images[stem]} and {name}; the first counts")
            else:
                images[stem] = name
    for stem in sorted({name.rpartition(".")[0] for name in texts} - set(images)):
        if stem.rpartition(".")[0] not in images and not stem.endswith("_stats"):
            yield Rejected(stem.removeprefix(prefix), "caption_without_image", "no image file has this name")
    for stem, name in images.items():
        yield _sample(storage, stem, name, texts, stem.removeprefix(prefix), caption_fields, max_image_bytes)


def _sample(
    storage: Storage, stem: str, name: str, texts: set[str], key: str, caption_fields: tuple[str, ...], max_image_bytes: int
) -> RawSample | Rejected:
    size = storage.size_or_none(name)
    if size is not None and size > max_image_bytes:
        return Rejected(key, "image_too_many_bytes", f"{size} bytes")
    captions, metadata = [], {}
    own = f"{stem}.txt"
    further = sorted(t for t in texts if t.startswith(f"{stem}.") and t.endswith(".txt") and t != own)
    for text in [own, *further]:
        if text in texts:
            try:
                captions.append((storage.read_or_none(text) or b"").decode("utf-8"))
            except UnicodeDecodeError as error:
                return Rejected(key, "caption_not_utf8", f"{text}: {error.reason}")
    if f"{stem}.json" in texts:
        metadata_or_none = parse_metadata(storage.read_or_none(f"{stem}.json") or b"")
        if metadata_or_none is None:
            return Rejected(key, "bad_metadata", f"{stem}.json is not a JSON object")
        metadata = metadata_or_none
    return finish_sample(key, storage.read_or_none(name) or b"", captions, metadata, caption_fields)
