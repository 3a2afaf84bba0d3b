"""Encoding from and to a real S3 server, through a proxy that fails as S3 does."""

import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from encoding_support import content, encode_here, image_bytes, make_shards, recipe_values, small_disk, write_recipe, write_tar
from forked import Program
from s3_support import BUCKET

from fluid_core.cli import main as fluid
from fluid_core.config import Recipe
from fluid_core.data import plan as plan_module
from fluid_core.data import storage as storage_module
from fluid_core.data.plan import make_plan
from fluid_core.data.storage import AccessError, S3Storage, TransientError, open_storage
from fluid_core.encoding.encode import Encode
from fluid_core.encoding.ledger import Ledger
from fluid_core.encoding.report import write_report
from fluid_core.encoding.run import Output
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


def put_folder(folder: Path, uri: str) -> None:
    storage = open_storage(uri)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.put_file(path, path.relative_to(folder).as_posix(), overwrite=True)


def rows(root: Path | str) -> pa.Table:
    """All rows of a data set in its order, with latents and embeddings."""
    dataset = EncodedDataset(str(root))
    return pa.concat_tables([dataset.read_table(s, g) for s, g, _ in dataset.row_groups]).combine_chunks()


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each ranged read of an S3 object gave."""
    real, sizes = S3Storage.read_at, []

    def read_at(self: S3Storage, name: str, size: int, offset: int) -> bytes:
        data = real(self, name, size, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(S3Storage, "read_at", read_at)
    return sizes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards (`data`), and what one undisturbed encoder made of them (`out`)."""
    folder = tmp_path_factory.mktemp("alone")
    make_shards(folder / "data", 5, 6)
    encode_here(Recipe.model_validate(recipe_values(folder, [str(folder / "data")], folder / "out")))
    return folder


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
    left = iter(["cut", "reset", "cut"])
    part = store.fetch("big", tmp_path, 1 << 20, (2 << 20) + 7).read_bytes()
    assert len(part) == (2 << 20) + 7 and part[1 << 20 :] == data[1 << 20 : (2 << 20) + 7]
    left = iter(["cut", "503"])
    assert store.read_at("big", 100, 5000) == data[5000:5100] and store.read_at("big", 100, len(data) - 3) == data[-3:]
    assert next(left, None) is None


def test_expired_credentials_are_one_clear_error_at_once(proxy):
    store = open_storage(f"s3://{BUCKET}/unit")
    proxy.fault = lambda method, path: "expired"
    with pytest.raises(AccessError, match="renew the credentials"):
        store.put_bytes(b"x", "x", overwrite=False)
    assert len(proxy.seen) == 1
    proxy.fault = lambda method, path: None


def test_credentials_that_expire_end_a_run_with_one_line(proxy, alone, tmp_path):
    """Real Ray, whose workers meet the error."""
    prefix = f"s3://{BUCKET}/expiring"
    put_folder(alone / "data", f"{prefix}/data")
    recipe = write_recipe(tmp_path / "recipe.yaml", [f"{prefix}/data/*.tar"], f"{prefix}/out")
    command = ["pipelines/encode_dataset.py", "--config", str(recipe)]
    environment = {
        name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"
    }  # its Ray has the proxy's address
    records = []

    def expires(method: str, path: str) -> str | None:
        if method == "PUT" and "/_ledger/" in path:
            records.append(path)
        return "expired" if len(records) > 1 else None

    proxy.fault = expires
    code, said = Program(command, tmp_path / "first", environment).end(120)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "renew the credentials" in lines[0] and "Traceback" not in said, said


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
    put_folder(tmp_path / "data", f"{prefix}/data")
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


def race(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Two encoders, in threads `first` and `second`, that find the same shards missing and go at them at once.

    Returns of each try to commit a shard whether it made the record.
    """
    start, made, errors = threading.Barrier(2, timeout=120), [], []
    pending, commit = Output.pending, Ledger.commit

    def found_together(self: Output) -> Any:
        found = pending(self)
        start.wait()
        return found

    def counted(self: Ledger, record: Any) -> bool:
        made.append(commit(self, record))
        return made[-1]

    monkeypatch.setattr(Output, "pending", found_together)
    monkeypatch.setattr(Ledger, "commit", counted)

    def run() -> None:
        try:
            encode_here(recipe)
        except BaseException as error:  # reported by the test
            errors.append(error)

    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return made


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_two_encoders_race_on_one_output(where, s3, alone, tmp_path, monkeypatch):
    output = f"{s3}/race" if where == "s3" else str(tmp_path / "out")
    made = race(Recipe.model_validate(recipe_values(tmp_path, [str(alone / "data")], output)), monkeypatch)
    assert made.count(True) == 5 < len(made)
    assert content(output) == content(alone / "out") and "manifest.json" in content(output)


def test_racing_encoders_that_round_differently(s3, alone, tmp_path, monkeypatch):
    """On other hardware: whoever put a file first, the records describe the files that are there."""
    real = Encode._image_bytes

    def rounded(self: Encode, images: Any) -> list[bytes]:
        second = threading.current_thread().name == "second"
        return [bytes([value[0] ^ second]) + value[1:] for value in real(self, images)]

    monkeypatch.setattr(Encode, "_image_bytes", rounded)
    made = race(Recipe.model_validate(recipe_values(tmp_path, [str(alone / "data")], f"{s3}/rounds")), monkeypatch)
    assert made.count(True) == made.count(False) == 5
    verify(EncodedDataset(f"{s3}/rounds"))
    here, there = rows(alone / "out"), rows(f"{s3}/rounds")
    assert there.drop_columns("moments").equals(here.drop_columns("moments"))
    pairs = zip(here["moments"].to_pylist(), there["moments"].to_pylist(), strict=True)
    assert all(b[0] in (a[0], a[0] ^ 1) and b[1:] == a[1:] for a, b in pairs)


def test_forget_on_s3_leaves_what_it_leaves_on_disk(alone, proxy, tmp_path, capsys):
    root, uri = tmp_path / "out", f"s3://{BUCKET}/forget"
    shutil.copytree(alone / "out", root)
    put_folder(root, uri)
    gone = [f"{i:06d}" for i in (0, 4, *range(12, 18))]  # some of a shard, and all of one
    (tmp_path / "keys").write_text("\n".join(gone))
    opened_before = EncodedDataset(uri)
    proxy.fault = sometimes(0.3, ["500", "reset", "cut"], 1)
    for dataset in (str(root), uri):
        with pytest.raises(SystemExit) as done:
            fluid(["forget", "--dataset", dataset, "--keys", str(tmp_path / "keys")])
        assert not done.value.code
        assert f"{dataset}: 8 samples removed from 2 shards" in capsys.readouterr().out
    assert len(proxy.seen) > 5
    proxy.fault = lambda method, path: None
    assert content(uri) == content(root) != content(alone / "out")
    after = EncodedDataset(uri)
    verify(after)
    assert rows(uri)["key"].to_pylist() == [f"{i:06d}" for i in range(30) if f"{i:06d}" not in gone]
    assert after.manifest.counts["out"] == 22 and after.manifest.counts["filtered"] == {"forgotten": 8}
    with pytest.raises(ValueError, match="the manifest says"):
        opened_before.read_group(0, 0)


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Path:
    """A tar of 40 samples with images of 12 KiB, `data/giant.tar` here and on S3, encoded whole (`whole`) and here in parts of
    12 (`parts`)."""
    folder = tmp_path_factory.mktemp("giant")
    members = [(f"{i:03d}.bmp", image_bytes(i, format="BMP")) for i in range(40)]
    captions = [(f"{i:03d}.txt", f"a picture of number {i}".encode()) for i in range(40)]
    write_tar(folder / "data/giant.tar", [m for pair in zip(members, captions, strict=True) for m in pair])
    put_folder(folder / "data", f"{s3}/giant/data")
    for name, samples in (("whole", 1000), ("parts", 12)):
        encode = {"max_shard_samples": samples}
        encode_here(Recipe.model_validate(recipe_values(folder, [str(folder / "data")], folder / name, encode=encode)))
    return folder


def test_a_giant_on_s3_is_split_as_on_disk(giant, proxy, bytes_read, tmp_path, monkeypatch):
    source, size = f"s3://{BUCKET}/giant/data", (giant / "data/giant.tar").stat().st_size
    monkeypatch.setattr(plan_module, "HEAD_BYTES", 1 << 12)
    monkeypatch.setattr(plan_module, "CHUNK_BYTES", 1 << 12)
    # The head tells: at most a hundred samples, which is no giant.
    assert [s.stop for s in make_plan([source], 100)] == [-1] and bytes_read == [1 << 12]
    bytes_read.clear()
    proxy.fault = sometimes(0.3, ["500", "cut"], 1)
    parts = make_plan([source], 12)
    assert [(s.start, s.stop) for s in parts] == [(s.start, s.stop) for s in make_plan([str(giant / "data")], 12)]
    assert len(parts) == 4 and sum(bytes_read) < size / 2  # images are hopped over
    values = recipe_values(tmp_path, [source], tmp_path / "out", encode={"max_shard_samples": 12})
    (manifest,) = encode_here(Recipe.model_validate(values))
    assert "cut" in proxy.seen and [s.rows for s in manifest.shards] == [12, 12, 12, 4]
    assert [s.sha256 for s in manifest.shards] == [s.sha256 for s in EncodedDataset(str(giant / "parts")).manifest.shards]
    assert rows(tmp_path / "out").equals(rows(giant / "whole"))


def test_the_report_shows_originals_that_lie_on_s3(giant, proxy, tmp_path):
    values = recipe_values(tmp_path, [f"s3://{BUCKET}/giant/data"], tmp_path / "out", encode={"max_shard_samples": 12})
    encode_here(Recipe.model_validate(values))
    fetched: list[str] = []
    proxy.fault = lambda method, path: fetched.append(path) if method == "GET" and path.endswith(".tar") else None
    page = tmp_path / "page.html"
    write_report(EncodedDataset(str(tmp_path / "out")), page)
    shown = page.read_text().count("<figure>")
    assert shown == 16 and page.read_text().count("data:image/png") == 2 * shown
    assert len(fetched) == 4  # each part once, though several row groups of it are shown
    proxy.fault = lambda method, path: "expired" if path.endswith(".tar") else None
    write_report(EncodedDataset(str(tmp_path / "out")), page)
    assert page.read_text().count("data:image/png") == page.read_text().count("<figure>") == shown


def test_copies_in_several_stores_are_one_shard(s3, bytes_read, tmp_path, monkeypatch):
    head = random.Random(0).randbytes(100_000)
    for name in "abc":
        for folder in ("here", "one"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.tar").write_bytes(head + name.encode() * 100)
    (tmp_path / "here/c.tar").unlink()  # so that there is one of the same size and head as c on S3, and it is another shard
    here, one, parts = str(tmp_path / "here"), f"{s3}/copies/one", f"{s3}/copies/parts"
    put_folder(tmp_path / "one", one)
    monkeypatch.setattr(storage_module, "LARGEST_PUT_BYTES", 0)  # no ETag of these is an MD5
    put_folder(tmp_path / "one", parts)

    def refused(*sources: str, **options: Any) -> dict[str, str]:
        plan = make_plan(sources, **options)
        return {s.uri: s.duplicate_of for s in plan if s.duplicate_of}

    assert refused(here, one) == {f"{one}/{n}.tar": f"{here}/{n}.tar" for n in "ab"}
    assert refused(parts, here) == {f"{here}/{n}.tar": f"{parts}/{n}.tar" for n in "ab"}
    assert refused(one, parts) == {f"{parts}/{n}.tar": f"{one}/{n}.tar" for n in "abc"}
    assert len(refused(one, parts, here)) == 5
    # A later plan compares heads alone, and one whose etags all are of a kind nothing.
    before = make_plan([here, one])
    bytes_read.clear()
    assert make_plan([here, one], known=before) == before and bytes_read == [1 << 16] * 3
    bytes_read.clear()
    assert not refused(one) and not bytes_read


def test_a_full_disk_while_a_shard_is_fetched(alone, s3, tmp_path):
    put_folder(alone / "data", f"{s3}/full/data")
    encode = {"scratch": str(tmp_path / "disk")}
    recipe = Recipe.model_validate(recipe_values(tmp_path, [f"{s3}/full/data"], tmp_path / "out", encode=encode))
    with small_disk(tmp_path / "disk", 8) as mounted:
        if not mounted:
            pytest.skip("this process may not mount a small disk")
        with pytest.raises(ValueError, match=r"no space left.*encode\.scratch"):
            encode_here(recipe)
        assert not list((tmp_path / "disk").iterdir())
