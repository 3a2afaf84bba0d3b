import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from fluid_core.config import StandInT5Config
from fluid_core.encoders.stand_in import create_stand_in_t5
from fluid_core.encoders.text import TextEncoder

WORDS = Counter(["a", "red", "blue", "circle", "square", "and", "above", "two", "light", "medium-dark", "skin", "tone"])
CAPTIONS = ["a red circle", "", "a blue square and a red circle", "two red circle", "a blue circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "t5"
    create_stand_in_t5(WORDS, StandInT5Config(width=32, layers=2, heads=2, vocabulary=256), path, seed=0)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.from_pretrained(folder, max_tokens=16, dtype="fp32")


def test_states_are_those_of_valid_tokens_only(encoder):
    ids = encoder.tokenize(CAPTIONS)
    assert ids[1] == [encoder.tokenizer.eos_token_id], "an empty caption is its end-of-sequence token: the null caption"
    states = encoder.encode(CAPTIONS)
    assert [state.shape for state in states] == [(len(row), 32) for row in ids]
    for caption, state in zip(CAPTIONS, states, strict=True):
        torch.testing.assert_close(state, encoder.encode([caption])[0])


def test_equal_to_transformers_with_padding_and_mask(encoder):
    """Ours has no padding; the usual padded and masked call gives the same states at the valid places."""
    batch = encoder.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = encoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    for state, row in zip(encoder.encode(CAPTIONS), padded, strict=True):
        torch.testing.assert_close(state, row[: len(state)], atol=1e-5, rtol=1e-5)


def test_captions_share_a_row_and_see_nothing_of_each_other(encoder, monkeypatch):
    calls = []
    forward = type(encoder.model).forward
    monkeypatch.setattr(
        type(encoder.model), "forward", lambda *a, **k: calls.append(tuple(k["input_ids"].shape)) or forward(*a, **k)
    )
    words, generator = encoder.model.config.vocab_size, torch.Generator().manual_seed(0)
    ids = [torch.randint(2, words, (length,), generator=generator).tolist() for length in (9, 3, 16, 7, 5, 1, 4, 20)]
    states = encoder.encode_ids(ids)
    # Rows of max_tokens = 16, but for the caption that is longer: 20; 16; 9 and 7; 5, 4, 3 and 1.
    assert calls == [(4, 20)]
    for i, caption in enumerate(ids):
        torch.testing.assert_close(states[i], encoder.encode_ids([caption])[0], atol=1e-5, rtol=1e-5)
        others = [[(token + 1) % words for token in other] if j != i else other for j, other in enumerate(ids)]
        assert torch.equal(encoder.encode_ids(others)[i], states[i]), "whatever the others say"
    calls.clear()
    monkeypatch.setattr("fluid_core.encoders.text.T5_TOKENS_PER_BATCH", 45)
    for ours, expected in zip(encoder.encode_ids(ids), states, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert calls == [(2, 20), (2, 20)]


def test_long_captions_are_cut_and_flagged_or_refused(encoder):
    long = " ".join(["red"] * 40)
    ids, cut = encoder.tokenize_flagged(["a red circle", long])
    assert cut == [False, True]
    assert len(ids[1]) == encoder.max_tokens
    assert ids[1][-1] == encoder.tokenizer.eos_token_id
    with pytest.raises(ValueError, match="longer than 16 tokens"):
        encoder.tokenize([long], cut=False)


@pytest.mark.parametrize("dtype", ["fp16", "float16"])
def test_fp16_is_refused_with_its_reason(folder, dtype):
    with pytest.raises(ValueError, match=r"overflows in fp16.*bf16 or fp32"):
        TextEncoder.from_pretrained(folder, dtype=dtype)


def test_bf16_is_close_to_fp32(folder, encoder):
    half = TextEncoder.from_pretrained(folder, max_tokens=16, dtype="bf16")
    assert half.dtype == torch.bfloat16
    for low, full in zip(half.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True):
        assert torch.nn.functional.cosine_similarity(low.float(), full, dim=1).min() > 0.99


def test_byt5(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path, max_tokens=64, dtype="fp32")
    caption = "naïve 你好 circle"
    assert len(encoder.tokenize([caption])[0]) == len(caption.encode()) + 1
    assert encoder.encode([caption])[0].shape == (len(caption.encode()) + 1, 32)


def test_identity_changes_with_the_weights(folder, tmp_path):
    encoder = TextEncoder.from_pretrained(folder)
    encoder.save_pretrained(tmp_path / "copy")
    fp32 = TextEncoder.from_pretrained(folder, dtype="fp32")
    fp32.save_pretrained(tmp_path / "same")
    same = TextEncoder.from_pretrained(tmp_path / "same").identity()
    assert same["sha256"] == fp32.identity()["sha256"]
    path = tmp_path / "same" / "model.safetensors"
    weights = load_file(path)
    weights["shared.weight"][0, 0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})
    assert TextEncoder.from_pretrained(tmp_path / "same").identity()["sha256"] != same["sha256"]


def test_bad_folders_say_what_is_wrong(tmp_path, folder):
    with pytest.raises(ValueError, match=r"text_encoder: folder .* does not exist"):
        TextEncoder.from_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        TextEncoder.from_pretrained(tmp_path / "empty")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="text_encoder"):
        TextEncoder.from_pretrained(other)
    with pytest.raises(ValueError, match="max_tokens 0"):
        TextEncoder.from_pretrained(folder, max_tokens=0)


def test_empty_batches(encoder):
    assert encoder.encode([]) == []
    with pytest.raises(ValueError, match="no tokens"):
        encoder.encode_ids([[3, 1], []])
