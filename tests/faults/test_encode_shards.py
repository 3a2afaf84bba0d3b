"""Broken shards, a full disk, a storage that fails: in every case in = out + filtered + quarantined, or one clear error."""

import errno
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from encoding_support import (
    content,
    encode_here,
    encoders,
    image_bytes,
    make_shards,
    recipe_values,
    sample_members,
    small_disk,
    write_tar,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluid_core.cli import main as fluid
from fluid_core.config import Recipe
from fluid_core.encoding import committer
from fluid_core.latents.reader import EncodedDataset


def recipe(folder: Path, sources: list[str], output: Path | None = None, **sections: Any) -> Recipe:
    return Recipe.model_validate(recipe_values(folder, sources, output or folder / "out", **sections))


def balanced(counts: dict[str, Any]) -> bool:
    return counts["in"] == counts["out"] + sum(counts["filtered"].values()) + sum(counts["quarantined"].values())


def test_all_kinds_of_broken_shards_in_one_run(tmp_path, capsys):
    data = tmp_path / "data"
    make_shards(data, 2, 6)
    make_shards(tmp_path / "more", 2, 6, first=100)
    for name, source, member, extra in (("cut", "00000", 8, 515), ("boundary", "00001", 10, 0), ("half", "00001", 7, 0)):
        with tarfile.open(tmp_path / f"more/{source}.tar") as tar:
            end = tar.getmembers()[member].offset + extra  # in the data of a member, or where its header would begin
        (data / f"{name}.tar").write_bytes((tmp_path / f"more/{source}.tar").read_bytes()[:end])
    (data / "empty.tar").write_bytes(b"")
    (data / "html.tar").write_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
    whole = write_tar(data / "images.tar", [
        *[m for i in range(10) for m in sample_members(f"g{i}", 200 + i)],
        ("truncated.jpg", image_bytes(1, (200, 200), "JPEG")[:-500]), ("truncated.txt", b"t"),
        ("zero.png", b""), ("zero.txt", b"t"), ("pixel.png", image_bytes(2, (1, 1))), ("pixel.txt", b"t"),
        ("liar.jpg", image_bytes(3)), ("liar.txt", b"a png named jpg"), ("alone.png", image_bytes(4)),
    ])  # fmt: skip
    assert whole.is_file()
    (manifest,) = encode_here(recipe(tmp_path, [str(data)]))
    assert balanced(manifest.counts)
    quarantined = manifest.counts["quarantined"]
    once = {"truncated_image", "empty_image", "empty_shard", "not_a_tar"}
    assert {reason for reason, number in quarantined.items() if number == 1} == once
    # "half" lost a caption with its end, and the image without one in "images".
    assert quarantined["tar_truncated"] == 3 and quarantined["missing_caption"] == 2
    assert manifest.counts["shards_set_aside"] == 2
    with pytest.raises(SystemExit) as done:
        fluid(["inspect", str(tmp_path / "out"), "--json", "--html", str(tmp_path / "page.html")])
    assert not done.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["out"] == manifest.counts["out"] and printed["quarantined"] == quarantined and printed["shards"] == 8
    page = (tmp_path / "page.html").read_text()
    assert "truncated_image" in page and page.count("<figure>") > 4 and page.count("data:image/png") > page.count("<figure>")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_is_one_error_and_the_next_run_goes_on(tmp_path, monkeypatch):
    for name, samples, first in (("0", 4, 0), ("1", 60, 100), ("2", 4, 200)):
        make_shards(tmp_path / "data" / name, 1, samples, first)
    encode_here(recipe(tmp_path, [str(tmp_path / "data")], tmp_path / "undisturbed"))
    config = recipe(tmp_path, [str(tmp_path / "data")], encode={"scratch": str(tmp_path / "disk")})
    with small_disk(tmp_path / "disk", 64) as mounted:
        if not mounted:
            fail_second_shard(monkeypatch)
        with pytest.raises(ValueError, match=r"no space left.*encode\.scratch"):
            encode_here(config)
        assert len(list((tmp_path / "out/_ledger").iterdir())) == 1
        assert not list((tmp_path / "disk").iterdir())
    encode_here(config)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def fail_second_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a full disk does, where a small one cannot be mounted."""
    real, calls = committer.write_quarantine, []

    def full(path: Path, records: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, records)

    monkeypatch.setattr(committer, "write_quarantine", full)


@settings(max_examples=int(os.environ.get("FLUID_MUTATIONS", "12")), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12))
def test_mutated_tars_are_encoded_or_accounted_for(tmp_path_factory, seed, count):
    folder = tmp_path_factory.mktemp("mutated")
    keys = make_shards(folder / "data", 1, 5)
    path = folder / "data/00000.tar"
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(count):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    (manifest,) = encode_here(recipe(folder, [str(folder / "data")], encode={
        **recipe_values(folder, [], folder / "out")["encode"], "max_bad_ratio": 1.0,
    }))  # fmt: skip
    assert balanced(manifest.counts)
    dataset = EncodedDataset(str(folder / "out"))
    kept = [key for s, g, _ in dataset.row_groups for key in dataset.read_group(s, g, ["key"]).keys]
    assert len(kept) == len(set(kept))
    if not manifest.counts["quarantined"]:
        assert kept == keys
    assert encoders()
