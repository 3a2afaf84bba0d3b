"""Encoding from and to a real S3 server, through a proxy that fails as S3 does."""

import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from encoding_support import content, encode_here, make_shards, recipe_values
from s3_support import BUCKET

from fluid_core.config import Recipe
from fluid_core.data import storage as storage_module
from fluid_core.data.storage import AccessError, S3Storage, TransientError, open_storage
from fluid_core.encoding.verify import verify
from fluid_core.latents.reader import EncodedDataset

SEEDS = int(os.environ.get("FLUID_KILL_SEEDS", "1"))


def sometimes(rate: float, kinds: list[str], seed: int) -> Any:
    """A fault for a share of the requests, never more than three times running for one object."""
    rng, lock, count = random.Random(seed), threading.Lock(), {}

    def fault(method: str, path: str) -> str | None:
        with lock:
            if rng.random() < rate and count.get((method, path), 0) < 3:
                count[method, path] = count.get((method, path), 0) + 1
                return rng.choice(kinds)
            count[method, path] = 0
            return None

    return fault


def test_reads_and_conditional_writes(proxy):
    store = open_storage(f"s3://{BUCKET}/unit")
    assert store.put_bytes(b"first", "a/b", overwrite=False)
    assert not store.put_bytes(b"second", "a/b", overwrite=False)  # the race is lost, the object stays
    assert store.read_or_none("a/b") == b"first" and store.size_or_none("a/b") == 5
    assert store.put_bytes(b"third", "a/b", overwrite=True) and store.read_or_none("a/b") == b"third"
    assert store.read_or_none("nothing") is None and store.size_or_none("nothing") is None
    assert [o.name for o in store.list("a/")] == ["a/b"]
    store.delete("a/b")
    assert list(store.list()) == []


def test_a_download_goes_on_where_it_broke(proxy, tmp_path):
    store = open_storage(f"s3://{BUCKET}/unit")
    data = random.Random(0).randbytes(3 << 20)
    store.put_bytes(data, "big", overwrite=True)
    left = iter(["cut", "reset", "500", "cut"])
    proxy.fault = lambda method, path: next(left, None) if method == "GET" else None
    assert store.fetch("big", tmp_path).read_bytes() == data
    assert proxy.seen == ["cut", "reset", "500", "cut"]


def test_expired_credentials_are_one_clear_error_at_once(proxy):
    store = open_storage(f"s3://{BUCKET}/unit")
    proxy.fault = lambda method, path: "expired"
    with pytest.raises(AccessError, match="renew the credentials"):
        store.put_bytes(b"x", "x", overwrite=False)
    assert len(proxy.seen) == 1
    proxy.fault = lambda method, path: None


def test_wrong_secret(proxy, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessError, match="refuses access"):
        S3Storage(f"s3://{BUCKET}/unit").put_bytes(b"x", "x", overwrite=True)


def test_a_store_that_stays_down_is_a_passing_error(proxy):
    proxy.fault = lambda method, path: "503"
    with pytest.raises(TransientError, match="attempts"):
        open_storage(f"s3://{BUCKET}/unit").read_or_none("x")
    assert len(proxy.seen) == storage_module.ATTEMPTS


@pytest.mark.parametrize("seed", range(1, 1 + SEEDS))
def test_encoding_over_a_bad_network_equals_one_on_disk(proxy, tmp_path, seed):
    make_shards(tmp_path / "data", 3, 6)
    encode_here(Recipe.model_validate(recipe_values(tmp_path, [str(tmp_path / "data")], tmp_path / "local")))
    prefix = f"s3://{BUCKET}/run{seed}"
    source = open_storage(f"{prefix}/data")
    for path in sorted((tmp_path / "data").iterdir()):
        source.put_file(path, path.name, overwrite=True)
    proxy.fault = sometimes(0.4, ["500", "503", "reset", "cut", "cut", *["timeout"] * (seed == 1)], seed)
    recipe = Recipe.model_validate(recipe_values(tmp_path, [f"{prefix}/data/*.tar"], f"{prefix}/out"))
    (manifest,) = encode_here(recipe)
    assert len(proxy.seen) > 10
    proxy.fault = lambda method, path: None
    dataset = EncodedDataset(f"{prefix}/out")
    verify(dataset)
    assert manifest.counts["out"] == 18 and dataset.read_group(0, 0).captions == [f"a picture of number {i}" for i in range(6)]
    stored = {o.name for o in open_storage(f"{prefix}/out").list()}
    assert not {name for name in stored if name.startswith("_tmp")}
    # Latents, texts and manifests hold the same as those on disk; ids differ, they come from the ETag.
    local = EncodedDataset(str(tmp_path / "local")).manifest
    assert (local.latent_mean, local.counts) == (manifest.latent_mean, manifest.counts)
    assert [s.sha256 for s in local.shards] == [s.sha256 for s in manifest.shards]


def test_two_encoders_race_on_one_output(tmp_path):
    make_shards(tmp_path / "data", 5, 6)
    recipe = Recipe.model_validate(recipe_values(tmp_path, [str(tmp_path / "data")], tmp_path / "out"))
    encode_here(Recipe.model_validate(recipe_values(tmp_path, [str(tmp_path / "data")], tmp_path / "alone")))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            encode_here(recipe)
        except BaseException as error:  # reported by the test
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert Path(tmp_path / "out/manifest.json").is_file()
