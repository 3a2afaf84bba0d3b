"""The order of samples and the batches made of it: pure functions of the position, the same at any world size."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import small_recipe, write_dataset

from fluid_core.config import ModelConfig
from fluid_core.latents.reader import EncodedDataset, Rows
from fluid_core.random import sample_keys
from fluid_core.training.loader import Batch, Collator, Loader, Slicing, check_datasets
from fluid_core.training.order import BLOCK, DatasetOrder, MixtureOrder
from fluid_core.training.ray_data import RayDataLoader


def test_every_epoch_is_another_permutation_in_windows() -> None:
    groups = [(s, g, 5) for s in range(3) for g in range(4)]
    order = DatasetOrder(groups, "hash", 0, window=20)
    seen = []
    for epoch in (0, 1):
        windows = order.windows(epoch)
        assert [w.rows for w in windows] == [20, 20, 20] and [w.start for w in windows] == [0, 20, 40]
        assert sorted(g for w in windows for g in w.groups) == groups
        assert all(sorted(order.places(epoch, k)) == list(range(20)) for k in range(3))
        seen.append([g for w in windows for g in w.groups])
    assert seen[0] != seen[1]
    assert DatasetOrder(groups, "hash", 0, window=20).windows(1) == order.windows(1)
    assert DatasetOrder(groups, "other", 0, window=20).windows(0) != order.windows(0)


def test_mixture_keeps_its_shares_and_can_be_inverted() -> None:
    mixture = MixtureOrder([3.0, 1.0], seed=1)
    located = [mixture.locate(p) for p in range(2 * BLOCK)]
    for dataset, share in ((0, 0.75), (1, 0.25)):
        own = [p for p, (d, _) in enumerate(located) if d == dataset]
        assert len(own) == share * 2 * BLOCK
        assert [located[p][1] for p in own] == list(range(len(own)))
        assert mixture.global_positions(dataset, 10, len(own) - 7).tolist() == own[10:-7]
    with pytest.raises(ValueError, match="weight"):
        MixtureOrder([1.0, 1e-6], seed=0)


def test_a_data_set_joins_the_mixture_later() -> None:
    mixture = MixtureOrder([3.0, 1.0, 4.0], seed=1, begins=[BLOCK + 1, 0, 3 * BLOCK])
    located = [mixture.locate(p) for p in range(6 * BLOCK)]
    assert [mixture.phase(p) for p in (0, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK)] == [0, 0, 1, 2]
    assert {d for d, _ in located[: 2 * BLOCK]} == {1} and {d for d, _ in located[2 * BLOCK : 3 * BLOCK]} == {0, 1}
    for dataset, first, share in ((0, 2, 3 / 8), (1, 0, 1 / 8), (2, 3, 4 / 8)):
        own = [p for p, (d, _) in enumerate(located) if d == dataset]
        assert own[0] >= first * BLOCK and sum(p >= 3 * BLOCK for p in own) == share * 3 * BLOCK
        assert [located[p][1] for p in own] == list(range(len(own)))
        for start, stop in ((0, len(own)), (5, len(own) - 7), (BLOCK // 2, BLOCK // 2 + 1)):
            assert mixture.global_positions(dataset, start, stop).tolist() == own[start:stop]
        assert mixture.seen(dataset, 4 * BLOCK) == sum(p < 4 * BLOCK for p in own)
    assert MixtureOrder([3.0, 1.0], 1, [0, 0]).locate(5000) == MixtureOrder([3.0, 1.0], 1).locate(5000)
    with pytest.raises(ValueError, match="from_step 0"):
        MixtureOrder([1.0, 1.0], seed=0, begins=[1, 2000])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("loader") / "data")


def _loader(root: Path, folder: Path, rank: int, world_size: int, micro: int | None = None, window: int = 16) -> Loader:
    recipe = small_recipe(folder)
    data = EncodedDataset(str(root))
    return Loader([(data, 1.0)], recipe.model, 0, Slicing(12, rank, world_size, micro), window)


def test_same_global_batches_at_any_world_size_and_micro_batch(root: Path, tmp_path: Path) -> None:
    whole = [_loader(root, tmp_path, 0, 1).batches(start)[0] for start in (0, 12, 48)]
    for world_size, micro in ((2, None), (3, 2), (2, 3)):
        loaders = [_loader(root, tmp_path, rank, world_size, micro) for rank in range(world_size)]
        for reference, start in zip(whole, (0, 12, 48), strict=True):
            found = {}
            for loader in loaders:
                for batch in loader.batches(start):
                    for i, position in enumerate(batch.positions):
                        found[position] = (batch.keys[i], batch.tokens[i], batch.draws.mask_BN[i])
            assert sorted(found) == reference.positions
            for i, position in enumerate(reference.positions):
                key, tokens, mask = found[position]
                assert key == reference.keys[i]
                assert torch.equal(tokens, reference.tokens[i]) and torch.equal(mask, reference.draws.mask_BN[i])


def test_an_epoch_holds_every_row_once_and_epochs_draw_anew(root: Path, tmp_path: Path) -> None:
    loader = _loader(root, tmp_path, 0, 1)
    first = [b for start in range(0, 48, 12) for b in loader.batches(start)]
    keys = [key for batch in first for key in batch.keys]
    assert len(set(keys)) == 48
    second = [b for start in range(48, 96, 12) for b in loader.batches(start)]
    assert [k for b in second for k in b.keys] != keys
    place = {key: batch.tokens[i] for batch in second for i, key in enumerate(batch.keys)}
    assert not torch.equal(place[keys[0]], first[0].tokens[0])


def test_a_broken_sample_is_named_and_not_trained_on(root: Path, tmp_path: Path) -> None:
    data, model, keys = EncodedDataset(str(root)), small_recipe(tmp_path).model, sample_keys(0, torch.arange(8))

    def collate(rows: Rows, model: ModelConfig = model) -> Batch:
        return Collator(data.manifest, model)([(rows, i) for i in range(8)], list(range(8)), keys)

    rows = data.read_group(0, 0)
    assert rows.moments is not None and rows.text is not None and len(collate(rows).keys) == 8
    rows.moments[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinite latents in 1 sample.s.: '{rows.keys[2]}'"):
        collate(rows)
    rows.moments[2, 0, 3, 3], rows.text[5][1, 0] = 0.0, float("inf")
    with pytest.raises(ValueError, match=f"NaN or infinite text embeddings in 1 sample.s.: '{rows.keys[5]}'"):
        collate(rows)
    rows.text[5][1, 0], rows.codes = 0.0, torch.zeros(8, 4, 4, dtype=torch.int64)
    discrete = model.model_copy(update={"tokens": "discrete", "codebook_size": 24})
    assert len(collate(rows, discrete).keys) == 8
    rows.codes[4, 1, 1] = 24
    with pytest.raises(ValueError, match=f"sample '{rows.keys[4]}' has code 24, but model.codebook_size is 24"):
        collate(rows, discrete)


def test_stream_starts_anywhere_and_raises_what_the_thread_met(root: Path, tmp_path: Path) -> None:
    loader = _loader(root, tmp_path, 0, 1)
    stream = loader.stream(24)
    assert next(stream)[0].keys == loader.batches(24)[0].keys
    stream.close()
    copy = tmp_path / "copy"
    write_dataset(copy)
    broken = _loader(copy, tmp_path, 0, 1)
    (copy / "latents" / "shard001.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard001\.parquet is missing"):
        for _ in zip(range(8), broken.stream(0), strict=False):
            pass


def test_a_closed_stream_has_no_thread_left(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does closing wait for what never comes."""
    before = set(threading.enumerate())
    loader = _loader(root, tmp_path, 0, 1)
    collate, made, in_work, go_on = loader.collator, threading.Event(), threading.Event(), threading.Event()

    def slowly(rows: list[tuple[Rows, int]], positions: list[int], keys_B: torch.Tensor) -> Batch:
        if positions[0] == 24:
            made.set()
        if positions[0] == 36:
            in_work.set()
            go_on.wait(30)
        return collate(rows, positions, keys_B)

    loader.collator = slowly  # type: ignore[assignment]

    def left() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - before if thread.name == "fluid-loader"]

    full = loader.stream(0, prefetch=1)
    next(full)
    assert made.wait(30)
    full.close()
    assert not left(), "one that waits to hand over a batch"
    busy = loader.stream(12)
    next(busy)
    assert in_work.wait(30)
    threading.Timer(0.2, go_on.set).start()
    busy.close()
    assert go_on.is_set() and not left(), "one in the middle of a batch"
    go_on.clear()
    in_work.clear()
    stuck = loader.stream(24)
    next(stuck)
    assert in_work.wait(30)
    monkeypatch.setattr("fluid_core.training.loader.CLOSE_SECONDS", 0.1)
    stuck.close()
    (thread,) = left()
    go_on.set()
    thread.join(30)
    assert not thread.is_alive(), "it ends with its batch"


def test_a_start_within_a_batch_is_refused(root: Path, tmp_path: Path) -> None:
    """Before anything is read; both loaders ask the same question."""
    loader = _loader(root, tmp_path, 0, 1)
    streamed = RayDataLoader(EncodedDataset(str(root)), None, 0, loader.slicing, 16, loader.collator)
    for stream in (loader.stream, streamed.stream):
        with pytest.raises(
            ValueError, match="batch_size 12 does not divide the 30 samples that the checkpoint has seen: resume"
        ):
            stream(30)
        stream(36).close()


def test_text_is_padded_to_the_longest_caption_in_eights(root: Path, tmp_path: Path) -> None:
    batch = _loader(root, tmp_path, 0, 1).batches(0)[0]
    assert batch.text_BLE.shape == (12, 8, 16)
    assert int(batch.text_mask_BL.sum(1).max()) <= 6 and bool(batch.text_mask_BL.any(1).all())
    assert not bool(batch.text_BLE[~batch.text_mask_BL].any())


def test_data_of_another_geometry_or_encoder_is_refused(root: Path, tmp_path: Path) -> None:
    model = small_recipe(tmp_path).model
    data = EncodedDataset(str(root))
    check_datasets([(data, 1.0)], model, {})
    with pytest.raises(ValueError, match="latent shape"):
        check_datasets([(data, 1.0)], model.model_copy(update={"grid": 8}), {})
    with pytest.raises(ValueError, match="text width 16"):
        check_datasets([(data, 1.0)], model.model_copy(update={"text_width": 4096}), {})
    with pytest.raises(ValueError, match="kind kl"):
        check_datasets([(data, 1.0)], model.model_copy(update={"tokens": "discrete"}), {})
    for change, message in (
        ({"latent_mean": [9.0] * 4}, "latent mean"), ({"latent_std": [2.0] * 4}, "latent std"), ({"text_mode": "tokens"}, "text mode"),
    ):  # fmt: skip
        other = EncodedDataset(str(root))
        other.manifest = other.manifest.model_copy(update=change)
        with pytest.raises(ValueError, match=message):
            check_datasets([(data, 1.0), (other, 1.0)], model, {})
    with pytest.raises(ValueError, match=r"captions of up to 8 tokens, but model\.max_text_tokens is 4"):
        check_datasets([(data, 1.0)], model.model_copy(update={"max_text_tokens": 4}), {})
    data.manifest.encoders["image"]["sha256"] = "a" * 64
    with pytest.raises(ValueError, match="another image encoder"):
        check_datasets([(data, 1.0)], model, {"image": {"sha256": "b" * 64}})
    # Hub ids, whose weights need not be on this machine.
    data.manifest.encoders["text"] |= {"path": "google/t5-v1_1-xl", "revision": "1a" * 20}
    for revision in (None, "main", "1a" * 20):  # the branch may well be at that commit
        check_datasets([(data, 1.0)], model, {"text": {"path": "google/t5-v1_1-xl", "revision": revision}})
    with pytest.raises(
        ValueError, match=r"another text encoder \(path google/t5-v1_1-xl, the recipe's is google/t5-v1_1-xxl\)"
    ):
        check_datasets([(data, 1.0)], model, {"text": {"path": "google/t5-v1_1-xxl", "revision": None}})
    with pytest.raises(ValueError, match=r"revision (1a){20}, the recipe's is (2b){20}"):
        check_datasets([(data, 1.0)], model, {"text": {"path": "google/t5-v1_1-xl", "revision": "2b" * 20}})


def test_batches_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="3 workers"):
        Slicing(8, 0, 3, None)
    with pytest.raises(ValueError, match="micro_batch_size 5"):
        Slicing(12, 0, 2, 5)
    mine = [Slicing(12, rank, 2, 3).mine(np.arange(24)) for rank in (0, 1)]
    assert np.array_equal(mine[0], ~mine[1])
