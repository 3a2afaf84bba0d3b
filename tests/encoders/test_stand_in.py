import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_core.config import Recipe, StandInT5Config
from fluid_core.data.shapes import samples
from fluid_core.data.shard_writer import write_shards
from fluid_core.encoders import stand_in
from fluid_core.encoders.source import weights_sha256
from fluid_core.encoders.text import TextEncoder

CAPTIONS = [
    "a red circle",
    "a blue square",
    "two red circles above a blue square",
    "Woman’s hat",
    "piñata",
    "medium-dark skin tone",
]


def recipe(path: Path, sources: list[str] | None = None, **create: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "data": {"image_size": 64, "sources": sources or []},
            "image_tokenizer": {"path": "unused"},
            "text_encoder": {"path": str(path), "max_tokens": 32, "dtype": "fp32", "create": {"width": 64, **create}},
            "encode": {"output": "unused"},
        }
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = stand_in.ensure_text_encoder(recipe(tmp_path_factory.mktemp("t5") / "t5"), CAPTIONS)
    return TextEncoder.from_pretrained(folder, max_tokens=32, dtype="fp32")


def test_each_word_of_the_captions_is_one_token(encoder):
    for caption in CAPTIONS:
        (ids,) = encoder.tokenize([caption])
        assert len(ids) == len(caption.split()) + 1
        assert encoder.tokenizer.unk_token_id not in ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20))
def test_unknown_words_are_spelt_out(encoder, text):
    (ids,) = encoder.tokenize([text])
    assert encoder.tokenizer.unk_token_id not in ids
    decoded = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == text.lower()


def test_capitals_quotes_and_spaces_do_not_matter(encoder):
    assert encoder.tokenize(["A  RED\ncircle "]) == encoder.tokenize(["a red circle"])
    assert encoder.tokenize(["woman's hat"]) == encoder.tokenize(["Woman’s hat"])


def test_words_stay_distinguishable_and_keep_their_place_apart(encoder):
    """A frozen random encoder must not blur words: one word in two captions is nearer than any two words."""
    first, second = encoder.encode(["a red circle", "two red circles above a blue square"])
    similarity = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=2)
    assert similarity[1, 1] > 0.6, "red and red"
    assert similarity[1, 5] < 0.4, "red and blue"
    tokens = torch.arange(len(encoder.tokenizer))
    table = torch.nn.functional.normalize(encoder.model.shared.weight[tokens], dim=1)
    cosine = table @ table.T - torch.eye(len(tokens))
    assert cosine.abs().max() < 0.65


def test_made_once_and_again_only_for_other_words(tmp_path):
    made = recipe(tmp_path / "t5")
    folder = stand_in.ensure_text_encoder(made, CAPTIONS)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    first = weights_sha256(folder)
    stand_in.ensure_text_encoder(made, list(reversed(CAPTIONS)))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    stand_in.ensure_text_encoder(made, [*CAPTIONS, "a green triangle"])
    assert weights_sha256(folder) != first
    other = stand_in.ensure_text_encoder(recipe(tmp_path / "other"), CAPTIONS)
    assert weights_sha256(other) == first, "the same captions, config and seed make the same encoder anywhere"


def test_captions_come_from_the_training_tars(tmp_path):
    write_shards(samples("train", 40, 64, 0), tmp_path / "train", 16)
    folder = stand_in.ensure_text_encoder(recipe(tmp_path / "t5", [f"2::{tmp_path}/train/*.tar"]))
    encoder = TextEncoder.from_pretrained(folder, dtype="fp32")
    assert all(len(ids) <= 12 for ids in encoder.tokenize([s["caption"] for s in samples("train", 40, 64, 0)]))
    with pytest.raises(ValueError, match="prepare the data first"):
        stand_in.ensure_text_encoder(recipe(tmp_path / "none", [str(tmp_path / "absent/*.tar")]))


def test_damaged_tars_give_what_can_be_read(tmp_path, capsys):
    (path,) = write_shards(samples("train", 20, 64, 0), tmp_path, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    captions = stand_in.read_captions([str(path)])
    assert 5 <= len(captions) < 20


def _make_forever(path: str) -> None:
    words = [f"word{i}" for i in range(3000)]
    for turn in range(1000):
        stand_in.ensure_text_encoder(recipe(Path(path), vocabulary=8192), [*words, f"turn{turn}"])


@pytest.mark.parametrize("delay", [0.15, 0.4])
def test_killed_half_way_leaves_a_whole_folder_or_none(tmp_path, delay):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_make_forever, args=(str(tmp_path / "t5"),))
    process.start()
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if (tmp_path / "t5").exists():
        TextEncoder.from_pretrained(tmp_path / "t5", dtype="fp32").encode(["word1 word2"])
    stand_in.ensure_text_encoder(recipe(tmp_path / "t5"), CAPTIONS)
    TextEncoder.from_pretrained(tmp_path / "t5", dtype="fp32").encode(CAPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["t5"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    stand_in.create_stand_in_t5(Counter(["word"]), StandInT5Config(width=32), tmp_path / "t5", seed=0)
    with pytest.raises(ValueError, match="was not made by `create`"):
        stand_in.ensure_text_encoder(recipe(tmp_path / "t5"), CAPTIONS)


def test_bad_configs_say_so(tmp_path):
    with pytest.raises(ValueError, match="not a multiple of heads"):
        stand_in.ensure_text_encoder(recipe(tmp_path / "a", heads=3), CAPTIONS)
    with pytest.raises(ValueError, match="too small"):
        stand_in.ensure_text_encoder(recipe(tmp_path / "b", vocabulary=50), CAPTIONS)
    with pytest.raises(ValueError, match="hold no words"):
        stand_in.ensure_text_encoder(recipe(tmp_path / "c"), [" "])


def test_small_vocabulary_keeps_the_frequent_words(tmp_path):
    words = ["often"] * 5 + ["rare"]
    folder = stand_in.ensure_text_encoder(recipe(tmp_path / "t5", vocabulary=3 + 94 + 1 + 1), words)
    encoder = TextEncoder.from_pretrained(folder, dtype="fp32")
    assert len(encoder.tokenize(["often"])[0]) == 2
    assert len(encoder.tokenize(["rare"])[0]) > 4
