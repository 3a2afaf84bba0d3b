"""`training.loader: ray_data`: the stream of Ray Data behind the loader's interface, exact at a fixed world size."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from forked import Program
from small_run import small_recipe

from fluid_core.config import Recipe
from fluid_core.latents.reader import EncodedDataset
from fluid_core.training.loader import Batch, Collator, Slicing
from fluid_core.training.metrics import read_metrics
from fluid_core.training.ray_data import NAME, RayDataLoader, streaming_dataset
from fluid_core.training.run import check_inputs

_DATA = {"rows": 48, "shards": 4, "group": 4}


def _read(recipe: Recipe, *parts: tuple[int, int]) -> list[list[Batch]]:
    """What the two workers get: for each step, rank 0's micro-batch and rank 1's. As Ray Train splits the stream.

    Args:
        parts: (position to begin at, steps), one stream after the other.
    """
    data = EncodedDataset(recipe.encode.output)
    dataset, config = streaming_dataset(data, recipe.seed)
    shards = config.configure({NAME: dataset}, 2, None, None)
    found: list[list[Batch]] = [[], []]

    def work(rank: int) -> None:
        collator = Collator(data.manifest, recipe.model)
        loader = RayDataLoader(data, shards[rank][NAME], recipe.seed, Slicing(12, rank, 2, None), 16, collator)
        for start, steps in parts:
            stream = loader.stream(start)
            found[rank] += [next(stream)[0] for _ in range(steps)]
            stream.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [list(pair) for pair in zip(*found, strict=True)]


def _hash(pair: list[Batch]) -> str:
    return hashlib.sha256(torch.cat([batch.key_hashes for batch in pair]).numpy().tobytes()).hexdigest()


def test_the_stream_is_the_same_again_and_starts_anywhere(ray_session: str, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, _DATA)
    whole = _read(recipe, (0, 8))
    for epoch in (whole[:4], whole[4:]):
        keys = [key for pair in epoch for batch in pair for key in batch.keys]
        assert len(set(keys)) == len(keys) == 48
    assert [b.keys for b in whole[0]] != [b.keys for b in whole[4]], "each epoch is shuffled anew"
    # From the middle of an epoch; then, as after a roll-back, from the middle of the first one again.
    later = _read(recipe, (5 * 12, 3), (1 * 12, 2))
    for ours, theirs in zip(later, [*whole[5:], *whole[1:3]], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys == b.keys and a.positions == b.positions
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.text_BLE, b.text_BLE)
            assert torch.equal(a.draws.noise_RKC, b.draws.noise_RKC)
    # The values are those of the files.
    data, batch = EncodedDataset(recipe.encode.output), whole[0][1]
    stored = {key: (s, g, i) for s, g, _ in data.row_groups for i, key in enumerate(data.read_group(s, g).keys)}
    shard, group, row = stored[batch.keys[0]]
    text = data.read_group(shard, group).text
    assert text is not None and torch.equal(batch.text_BLE[0, : len(text[row])], text[row])


def test_a_run_reads_through_ray_data_and_resumes(ray_session: str, repository: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, _DATA, loader="ray_data", shuffle_window=16, validate_every=100)
    command = [str(repository / "pipelines" / "pretrain.py"), "--config", str(tmp_path / "recipe.yaml"), "--resume"]
    for steps in (2, 5):
        log = tmp_path / f"{steps}.log"
        status, out = Program([*command, "--set", f"training.max_steps={steps}"], log, cwd=repository).end()
        assert status == 0, out[-4000:]
    lines = read_metrics(recipe.training_dir / "metrics.jsonl")
    assert [line["keys_sha256"] for line in lines] == [_hash(pair) for pair in _read(recipe, (0, 5))]


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, loader="ray_data")
    recipe.training.datasets = [item.model_copy() for item in (*recipe.mixture, *recipe.mixture)]
    with pytest.raises(ValueError, match="reads one data set"):
        check_inputs(recipe)
