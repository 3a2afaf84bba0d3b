"""Every file of an encoded data set against the manifest's hashes."""

import hashlib
import tempfile
from pathlib import Path

from tqdm import tqdm

from fluid_core.latents.reader import EncodedDataset


def verify(dataset: EncodedDataset) -> None:
    """Raises ValueError naming the files that are missing or have other bytes."""
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        for shard in tqdm(dataset.manifest.shards, desc="verifying", unit="shard", disable=None):
            wanted = [("latents", shard.sha256)] if shard.rows else []
            wanted += [("text", shard.text_sha256)] if shard.text_sha256 else []
            for folder, sha256 in wanted:
                name = f"{folder}/{shard.id}.parquet"
                try:
                    with open(dataset.storage.fetch(name, Path(scratch)), "rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                            bad.append(f"{name} has other bytes")
                except FileNotFoundError:
                    bad.append(f"{name} is missing")
    if bad:
        raise ValueError(f"{dataset.root}: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}: encode again with --force")
