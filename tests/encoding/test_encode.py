"""What comes out of an encoding: the right latents and texts, every sample accounted for, the same bytes again."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoding_support import content, encode_here, encoders, image_bytes, make_shards, recipe_values, sample_members, write_tar
from PIL import Image
from safetensors.torch import load_file

from fluid_core.config import Recipe
from fluid_core.data.filters import OptOut
from fluid_core.data.storage import open_storage
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.text import TextEncoder
from fluid_core.encoding.chunks import DecodedChunk
from fluid_core.encoding.encode import Encode
from fluid_core.encoding.forget import forget
from fluid_core.encoding.ledger import Ledger
from fluid_core.encoding.read_decode import ReadDecode
from fluid_core.encoding.run import claim, prepare_output
from fluid_core.encoding.settings import encoder_folder, resolve_settings
from fluid_core.encoding.verify import verify
from fluid_core.latents.reader import EncodedDataset


def recipe(folder: Path, sources: list[str], output: str = "out", **sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe_values(folder, sources, folder / output, **sections))


def balance(counts: dict[str, Any]) -> None:
    assert counts["in"] == counts["out"] + sum(counts["filtered"].values()) + sum(counts["quarantined"].values())


def rows_of(root: Path) -> dict[str, tuple[Any, ...]]:
    """key -> (moments, text, caption) of a whole data set."""
    dataset = EncodedDataset(str(root))
    found = {}
    for shard, group, _ in dataset.row_groups:
        rows = dataset.read_group(shard, group)
        assert rows.moments is not None
        for i, key in enumerate(rows.keys):
            assert key not in found
            found[key] = (rows.moments[i], rows.text[i] if rows.text else None, rows.captions[i], rows.token_ids[i])
    return found


def test_rows_are_what_the_encoders_say(tmp_path):
    keys = make_shards(tmp_path / "data", 2, 11)
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data")]))
    assert manifest.counts["in"] == manifest.counts["out"] == 22
    assert [shard.row_groups for shard in manifest.shards] == [[8, 3], [8, 3]]
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == sorted(keys)
    vae = ImageTokenizer.from_pretrained(encoders()[0])
    t5 = TextEncoder.from_pretrained(encoders()[1], max_tokens=32, dtype="fp32")
    for key in (keys[0], keys[10], keys[21]):
        moments, text, caption, token_ids = rows[key]
        array = np.asarray(Image.open(io.BytesIO(image_bytes(int(key)))))
        expected = vae.encode(torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        torch.testing.assert_close(moments.float(), expected, rtol=1e-2, atol=1e-2)
        assert caption == f"a picture of number {int(key)}"
        assert token_ids.tolist() == t5.tokenize([caption])[0]
        torch.testing.assert_close(text.float(), t5.encode([caption])[0], rtol=1e-2, atol=1e-2)
    everything = torch.stack([moments for moments, *_ in rows.values()]).double()
    mean, logvar = everything.chunk(2, dim=1)
    torch.testing.assert_close(torch.tensor(manifest.latent_mean).double(), mean.mean((0, 2, 3)))
    variance = mean.var((0, 2, 3), unbiased=False) + logvar.exp().mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(manifest.latent_std).double(), variance.sqrt())
    null = manifest.null_embedding()
    torch.testing.assert_close(null.float(), t5.encode([""])[0], rtol=1e-2, atol=1e-2)
    verify(EncodedDataset(str(tmp_path / "out")))


def test_two_runs_give_the_same_bytes(tmp_path):
    make_shards(tmp_path / "data", 3, 7)
    first, second = (recipe(tmp_path, [str(tmp_path / "data")], name) for name in ("a", "b"))
    assert encode_here(first)[0].hash == encode_here(second)[0].hash
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_restart_does_only_what_is_missing(tmp_path):
    make_shards(tmp_path / "data", 3, 4)
    config = recipe(tmp_path, [str(tmp_path / "data")])
    encode_here(config)
    before = content(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/latents").iterdir()}
    victim = sorted((tmp_path / "out/_ledger").iterdir())[1]
    victim.unlink()  # killed after the files were put, before the record
    (tmp_path / f"out/text/{victim.stem}.parquet").unlink()
    (tmp_path / "out/manifest.json").unlink()
    encode_here(config)
    assert content(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/latents").iterdir()} == times


def test_other_settings_or_a_damaged_file_are_refused(tmp_path):
    make_shards(tmp_path / "data", 1, 4)
    encode_here(recipe(tmp_path, [str(tmp_path / "data")]))
    with pytest.raises(ValueError, match="flip"):
        encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode={**flip(tmp_path)}))
    encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode={**flip(tmp_path)}), force=True)
    (path,) = (tmp_path / "out/latents").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    dataset = EncodedDataset(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="bytes, the manifest says"):
        dataset.read_group(0, 0)
    with pytest.raises(ValueError, match="other bytes"):
        verify(dataset)


def flip(folder: Path) -> dict[str, Any]:
    return {**recipe_values(folder, [], folder / "out")["encode"], "flip": True}


def test_flip_int8_and_several_captions(tmp_path):
    members = [*sample_members("k", 1, "one"), ("k.other.txt", b"another caption")]
    write_tar(tmp_path / "data/0.tar", members)
    encode = {**flip(tmp_path), "text": {"mode": "embeddings", "dtype": "int8"}}
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode=encode))
    dataset = EncodedDataset(str(tmp_path / "out"))
    rows = dataset.read_group(0, 0, choose_caption=lambda key, count: count - 1)
    assert rows.captions == ["another caption"]
    assert rows.moments is not None and rows.moments_flip is not None and not torch.equal(rows.moments, rows.moments_flip)
    array = np.asarray(Image.open(io.BytesIO(image_bytes(1))))[:, ::-1].copy()
    vae = ImageTokenizer.from_pretrained(encoders()[0])
    mirrored = vae.encode(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
    torch.testing.assert_close(rows.moments_flip[0].float(), mirrored, rtol=1e-2, atol=1e-2)
    t5 = TextEncoder.from_pretrained(encoders()[1], max_tokens=32, dtype="fp32")
    assert rows.text is not None
    torch.testing.assert_close(rows.text[0].float(), t5.encode(["another caption"])[0], rtol=0.05, atol=0.05)
    assert manifest.text_cosine is not None and manifest.text_cosine["min"] > 0.999
    assert manifest.counts["captions"] == 2


def test_tokens_mode_has_no_sidecar(tmp_path):
    make_shards(tmp_path / "data", 1, 3)
    encode = {**recipe_values(tmp_path, [], tmp_path / "out")["encode"], "text": {"mode": "tokens"}}
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode=encode))
    rows = EncodedDataset(str(tmp_path / "out")).read_group(0, 0)
    assert rows.text is None and len(rows.token_ids) == 3 and not (tmp_path / "out/text").exists()
    assert "embedding" not in manifest.null_text
    with pytest.raises(ValueError, match="tokens"):
        manifest.null_embedding()


def test_buckets_keep_the_aspect(tmp_path):
    sizes = [(64, 64), (96, 64), (64, 96), (96, 64), (64, 64), (160, 64)]
    members = []
    for i, size in enumerate(sizes):
        members += [(f"{i}.png", image_bytes(i, size)), (f"{i}.txt", b"t")]
    write_tar(tmp_path / "data/0.tar", members)
    encode = {**recipe_values(tmp_path, [], tmp_path / "out")["encode"], "buckets": True}
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode=encode))
    assert manifest.counts["out"] == 6
    dataset = EncodedDataset(str(tmp_path / "out"))
    seen = {}
    for shard, group, _ in dataset.row_groups:
        rows = dataset.read_group(shard, group)
        assert rows.moments is not None
        height, width = dataset.latent_size(shard, group)
        assert rows.moments.shape[1:] == (8, height, width) and height % 2 == 0 and width % 2 == 0
        seen.update(dict.fromkeys(rows.keys, (height, width)))
    assert seen["0"] == (8, 8) and seen["1"][1] > seen["1"][0] and seen["2"] == seen["1"][::-1] and seen["3"] == seen["1"]


def test_filters_are_counted_each_under_its_reason(tmp_path):
    metadata = {"punsafe": 0.1, "url": "http://a/x.jpg"}
    samples = {
        "good": ("a fine caption here", metadata),
        "few": ("short", metadata),
        "unsafe": ("a fine caption here", {**metadata, "punsafe": 0.9}),
        "unknown": ("a fine caption here", {}),
        "gone": ("a fine caption here", {**metadata, "url": "http://b/y.jpg"}),
        "digits": ("123 456 7890 1234 ab", metadata),
    }
    members = [m for i, (key, (text, meta)) in enumerate(samples.items()) for m in sample_members(key, i, text, meta)]
    members += [
        ("small.png", image_bytes(9, (16, 64))),
        ("small.txt", b"a fine caption here"),
        ("small.json", json.dumps(metadata).encode()),
    ]
    members += [
        ("bad.jpg", b"\xff\xd8\xff garbage"),
        ("bad.txt", b"a fine caption here"),
        ("bad.json", json.dumps(metadata).encode()),
    ]
    write_tar(tmp_path / "data/0.tar", members)
    (tmp_path / "optout.txt").write_text("# comment\nhttp://b/y.jpg\n")
    filters = {
        "min_side": 32, "min_caption_words": 2, "min_ascii_letters": 0.5, "opt_out": str(tmp_path / "optout.txt"),
        "thresholds": [{"column": "punsafe", "maximum": 0.5, "missing": "drop"}],
    }  # fmt: skip
    data = {"image_size": 64, "sources": [str(tmp_path / "data")], "filters": filters}
    (manifest,) = encode_here(recipe(tmp_path, [], data=data))
    assert manifest.counts["filtered"] == {
        "caption_characters": 1, "caption_too_few_words": 1, "min_side": 1,
        "missing_punsafe": 1, "opt_out": 1, "threshold_punsafe": 1,
    }  # fmt: skip
    assert manifest.counts["quarantined"] == {"not_an_image": 1} and manifest.counts["out"] == 1
    balance(manifest.counts)
    (path,) = (tmp_path / "out/quarantine").iterdir()
    listed = {row["key"]: (row["status"], row["reason"]) for row in pq.read_table(path).to_pylist()}
    assert listed["bad"] == ("quarantined", "not_an_image") and listed["gone"] == ("filtered", "opt_out") and len(listed) == 7
    strict = {**filters, "thresholds": [{"column": "punsafe", "maximum": 0.5}]}
    with pytest.raises(ValueError, match="missing: keep"):
        encode_here(recipe(tmp_path, [], "out2", data={**data, "filters": strict}))


def test_a_bad_shard_is_set_aside_whole(tmp_path):
    members = [m for i in range(4) for m in sample_members(f"g{i}", i)]
    members += [m for i in range(6) for m in ((f"b{i}.png", b"not a picture"), (f"b{i}.txt", b"t"))]
    write_tar(tmp_path / "data/0.tar", members)
    make_shards(tmp_path / "data2", 1, 3)
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data"), str(tmp_path / "data2")]))
    assert manifest.counts["quarantined"] == {"not_an_image": 6, "shard_set_aside": 4}
    assert manifest.counts["in"] == 13 and manifest.counts["out"] == 3 and manifest.counts["shards_set_aside"] == 1
    bad = manifest.shards[0]
    assert bad.set_aside and bad.rows == 0 and not (tmp_path / f"out/latents/{bad.id}.parquet").exists()
    assert len(EncodedDataset(str(tmp_path / "out")).row_groups) == 1


def test_duplicates_within_and_against(tmp_path):
    first = [m for i in range(4) for m in sample_members(f"a{i}", i)]
    second = [m for i in range(2, 6) for m in sample_members(f"b{i}", i)] + sample_members("c", 5)
    write_tar(tmp_path / "data/0.tar", first)
    write_tar(tmp_path / "data/1.tar", second)
    filters: dict[str, Any] = {"deduplicate": True}
    data = {"image_size": 64, "sources": [str(tmp_path / "data")], "filters": filters}
    (manifest,) = encode_here(recipe(tmp_path, [], data=data))
    assert manifest.counts["filtered"] == {"duplicate": 3} and manifest.counts["in"] == 9
    assert sorted(rows_of(tmp_path / "out")) == ["a0", "a1", "a2", "a3", "b4", "b5"]
    # New sources do not take away what is there; images known elsewhere are dropped.
    write_tar(tmp_path / "data/00.tar", sample_members("z", 5) + sample_members("y", 7))
    (manifest,) = encode_here(recipe(tmp_path, [], data=data))
    assert sorted(rows_of(tmp_path / "out")) == ["a0", "a1", "a2", "a3", "b4", "b5", "y"]
    write_tar(tmp_path / "more/0.tar", sample_members("known", 1) + sample_members("new", 8))
    against = {**filters, "deduplicate_against": str(tmp_path / "out")}
    encode_here(recipe(tmp_path, [], "more_out", data={**data, "sources": [str(tmp_path / "more")], "filters": against}))
    assert list(rows_of(tmp_path / "more_out")) == ["new"]


def test_same_shard_twice_is_read_once(tmp_path, capsys):
    make_shards(tmp_path / "data", 1, 5)
    (tmp_path / "data/copy.tar").write_bytes((tmp_path / "data/00000.tar").read_bytes())
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data/*.tar")]))
    assert manifest.counts["in"] == 5 and len(manifest.shards) == 1
    assert manifest.duplicate_shards[0]["uri"].endswith("copy.tar") and "refused" in capsys.readouterr().err


def test_a_giant_shard_is_split(tmp_path):
    keys = make_shards(tmp_path / "data", 1, 40)
    encode = {**recipe_values(tmp_path, [], tmp_path / "out")["encode"], "max_shard_samples": 12}
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode=encode))
    assert [shard.rows for shard in manifest.shards] == [12, 12, 12, 4]
    assert list(rows_of(tmp_path / "out")) == keys and manifest.counts["in"] == 40


def test_forget_rewrites_shards_ledger_and_manifest(tmp_path):
    keys = make_shards(tmp_path / "data", 3, 10)
    config = recipe(tmp_path, [str(tmp_path / "data")])
    (before,) = encode_here(config)
    rows = rows_of(tmp_path / "out")
    gone = {keys[0], keys[3], *keys[10:18]}
    untouched = before.shards[2]
    done = forget(str(tmp_path / "out"), OptOut(frozenset(gone)))
    assert (done.samples, done.shards) == (10, 2)
    after = EncodedDataset(str(tmp_path / "out"))
    left = rows_of(tmp_path / "out")
    assert set(left) == set(keys) - gone and all(torch.equal(left[k][0], rows[k][0]) for k in left)
    assert after.manifest.counts["filtered"] == {"forgotten": 10} and after.manifest.shards[2] == untouched
    assert [s.row_groups for s in after.manifest.shards] == [[6, 2], [2], [8, 2]]
    balance(after.manifest.counts)
    verify(after)
    moments = torch.stack([m for m, *_ in left.values()]).double().chunk(2, dim=1)[0]
    torch.testing.assert_close(torch.tensor(after.manifest.latent_mean).double(), moments.mean((0, 2, 3)))
    assert forget(str(tmp_path / "out"), OptOut(frozenset(gone))).samples == 0
    assert encode_here(config)[0].hash == after.manifest.hash  # a restart leaves it as it is


def test_forget_goes_on_after_a_kill(tmp_path):
    keys = make_shards(tmp_path / "data", 1, 10)
    encode_here(recipe(tmp_path, [str(tmp_path / "data")]))
    root = tmp_path / "out"
    entries = OptOut(frozenset(keys[:3]))
    ledger = next((root / "_ledger").iterdir())
    old_record, old_manifest = ledger.read_bytes(), (root / "manifest.json").read_bytes()
    forget(str(root), entries)
    expected = content(root)
    ledger.write_bytes(old_record)  # killed before the record
    (root / "manifest.json").write_bytes(old_manifest)
    forget(str(root), entries)
    assert content(root) == expected
    record = Ledger(EncodedDataset(str(root)).storage).read(ledger.stem)
    assert record is not None and record.rows == 7


def test_the_opt_out_list_travels_with_the_work(tmp_path):
    make_shards(tmp_path / "data", 1, 3)
    (tmp_path / "out.txt").write_text("000001\n")
    data = {"image_size": 64, "sources": [str(tmp_path / "data")], "filters": {"opt_out": str(tmp_path / "out.txt")}}
    settings = resolve_settings(recipe(tmp_path, [], data=data))
    (shard,) = prepare_output([str(tmp_path / "data")], str(tmp_path / "out"), settings, force=False).plan
    packed = pickle.dumps(ReadDecode(settings))
    (tmp_path / "out.txt").unlink()  # a worker's machine has none
    (row,) = pickle.loads(packed).chunks({"shard": asdict(shard), "output": str(tmp_path / "out")})
    chunk, _ = DecodedChunk.from_row(pa.table(row))
    assert [(d.key, d.reason) for d in chunk.dropped] == [("000001", "opt_out")] and len(chunk.samples) == 2


def test_encoders_of_the_hub_are_pinned_to_a_commit(tmp_path, monkeypatch):
    """A branch may move during a run: the workers and the manifest get the commit that it stood at."""
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "5" * 40
    for name, source in zip(("vae", "t5"), encoders(), strict=True):
        repository = cache / f"models--fluid--{name}"
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    there = {"image_tokenizer": {"path": "fluid/vae"}, "text_encoder": {"path": "fluid/t5"}}
    hub = resolve_settings(recipe(tmp_path, [], **there))
    assert hub.image_revision == hub.text_revision == hub.encoders.image["revision"] == hub.encoders.text["revision"] == commit
    local = resolve_settings(recipe(tmp_path, []))
    assert local.image_revision is None and local.hash == hub.hash  # the same weights


def test_a_worker_with_other_weights_is_refused(tmp_path):
    settings = resolve_settings(recipe(tmp_path, []))
    moved = shutil.copytree(encoders()[0], tmp_path / "vae")
    (moved / "diffusion_pytorch_model.safetensors").write_bytes(other_weights(moved))
    with pytest.raises(ValueError, match="other weights on this worker"):
        Encode(replace(settings, image_path=str(moved)), [], [])


def other_weights(folder: Path) -> bytes:
    from safetensors.torch import load_file, save

    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    return save({name: value + 1 for name, value in weights.items()}, metadata={"format": "pt"})


def test_two_encoders_that_start_at_once_share_an_output(tmp_path):
    """The second one, which found nothing a moment ago, takes nothing away from the first."""
    make_shards(tmp_path / "data", 1, 3)
    settings = resolve_settings(recipe(tmp_path, [str(tmp_path / "data")]))
    storage = open_storage(str(tmp_path / "out"))
    real, written = storage.put_bytes, []

    def first_comes_first(data: bytes, name: str, overwrite: bool) -> bool:
        if not written:
            written.append(name)
            encode_here(recipe(tmp_path, [str(tmp_path / "data")]))
        return real(data, name, overwrite)

    storage.put_bytes = first_comes_first  # type: ignore[method-assign]
    assert claim(storage, settings) and written == ["_settings.json"]
    verify(EncodedDataset(str(tmp_path / "out")))


def test_a_first_run_that_failed_early_binds_nobody(tmp_path):
    config = recipe(tmp_path, [str(tmp_path / "data")])
    with pytest.raises(ValueError, match="does not exist"):
        encode_here(config)
    assert not (tmp_path / "out").exists()
    make_shards(tmp_path / "data", 1, 3)
    encode_here(config)
    next((tmp_path / "out/_ledger").iterdir()).unlink()  # nothing is committed, but files of these settings lie there
    (manifest,) = encode_here(recipe(tmp_path, [str(tmp_path / "data")], encode=flip(tmp_path)))
    assert manifest.flip and EncodedDataset(str(tmp_path / "out")).read_group(0, 0).moments_flip is not None


def test_a_hub_repository_without_safetensors(tmp_path, monkeypatch):
    """google/t5-v1_1-xxl holds only pytorch_model.bin: fetched when there is no other, and not otherwise."""
    fetched: list[str] = []

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.extend(allow_patterns)
        folder = tmp_path / ("a" * 40)
        shutil.copytree(encoders()[1], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        if "*.bin" in allow_patterns:
            torch.save(load_file(encoders()[1] / "model.safetensors"), folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder, commit = encoder_folder("fluid/t5", None, "text_encoder")
    assert commit == "a" * 40 and "*.bin" in fetched
    old, new = (TextEncoder.from_pretrained(path, max_tokens=8, dtype="fp32") for path in (folder, encoders()[1]))
    assert torch.equal(old.encode(["a red circle"])[0], new.encode(["a red circle"])[0])


_DECODES = """
import json, pickle, sys, ray.data
read_decode, work = pickle.load(sys.stdin.buffer)
(row,) = read_decode({"work": [json.dumps(work)]})
assert len(pickle.loads(row["chunk"][0]).samples) == 3
assert "torch" not in sys.modules
"""


def test_a_decode_worker_imports_no_torch(tmp_path):
    """It would double what each of them takes of memory, and there are many."""
    make_shards(tmp_path / "data", 1, 3)
    settings = resolve_settings(recipe(tmp_path, [str(tmp_path / "data")]))
    (shard,) = prepare_output([str(tmp_path / "data")], str(tmp_path / "out"), settings, force=False).plan
    sent = pickle.dumps((ReadDecode(settings), {"shard": asdict(shard), "output": str(tmp_path / "out")}))
    done = subprocess.run([sys.executable, "-c", _DECODES], input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
