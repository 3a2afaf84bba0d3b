"""Bundles on S3: copied up file by file with the manifest last, and down once a machine, however many replicas ask."""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from fluid_core.data.storage import open_storage
from fluid_core.generation.bundle import verify_bundle
from fluid_core.registry.bundle import MANIFEST, read_manifest


def upload_bundle(folder: Path, uri: str) -> None:
    """Copy a bundle to `uri`. Files that are there with the same name and size are weights of an earlier attempt: kept."""
    storage = open_storage(uri)
    sizes = {entry.name: entry.size for entry in storage.list()}
    for name in tqdm([*read_manifest(folder), MANIFEST], desc="upload bundle", unit="file"):
        if not name.endswith(".safetensors") or sizes.get(name) != (folder / name).stat().st_size:
            storage.put_file(folder / name, name, overwrite=True)


def local_bundle(path: str) -> Path:
    """A local folder with the bundle: the path itself, or for s3:// a verified copy in the cache ($FLUID_CACHE).

    Raises:
        ValueError: nothing there, or a copy that is not what its manifest says.
    """
    if "://" not in path:
        return Path(path)
    storage = open_storage(path)
    manifest = storage.read_or_none(MANIFEST)
    if manifest is None:
        raise ValueError(f"{path} is not a complete model bundle: it has no {MANIFEST}")
    root = Path(os.environ.get("FLUID_CACHE") or Path.home() / ".cache" / "fluid") / "bundles"
    root.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(path.encode() + manifest).hexdigest()[:32]
    target = root / key
    with open(root / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        work = root / f".{key}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        names = [entry.name for entry in storage.list() if entry.name != MANIFEST]
        for name in tqdm(names, desc="fetch bundle", unit="file"):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(name, work / ".fetch").replace(work / name)
        shutil.rmtree(work / ".fetch", ignore_errors=True)
        (work / MANIFEST).write_bytes(manifest)
        verify_bundle(work)
        os.replace(work, target)
    return target
