"""A small T5 encoder made at set-up where no pre-trained one is at hand: it stands in for `google/t5-v1_1-xxl`.

The architecture is T5 v1.1's; the weights are random. A frozen random encoder still gives each word its own direction and
each position its own mixture, and the model's trainable text aligner learns the rest. It knows nothing about language: a
word that no training caption holds is spelt out in letters and means nothing to the model.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from glob import glob
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fluid_core.config import Recipe, StandInT5Config
from fluid_core.workflow.stage import replace_folder

SPECIAL = ("<pad>", "</s>", "<unk>")  # with the ids that T5 gives them
LETTER_SCORE = -20.0  # log-probability: any whole word beats its spelling
RECORD = "stand_in.json"
FORMAT = 1  # part of the fingerprint: raise it when the same captions would give another encoder


def ensure_text_encoder(recipe: Recipe, captions: Iterable[str] | None = None) -> Path:
    """The folder of the recipe's text encoder, made first where the recipe has `text_encoder.create`.

    The folder appears whole or not at all. Its fingerprint covers the captions' words, the config and the seed, so that
    calling again does nothing, and other captions make another encoder.

    Args:
        captions: the training captions; by default those in the local tars of `data.sources`.

    Returns:
        `text_encoder.path`, unchanged for a pre-trained folder or hub id.
    """
    config = recipe.text_encoder
    folder = Path(config.path)
    if config.create is None:
        return folder
    words = count_words(read_captions(recipe.data.sources) if captions is None else captions)
    described = [FORMAT, config.create.model_dump(), recipe.seed, sorted(words.items())]
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    record = folder / RECORD
    if record.is_file() and json.loads(record.read_text())["fingerprint"] == fingerprint:
        return folder
    if folder.exists() and not record.is_file():
        raise ValueError(f"text_encoder.path {folder} was not made by `create`: remove `create`, or name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    create_stand_in_t5(words, config.create, partial, recipe.seed)
    (partial / RECORD).write_text(json.dumps({"fingerprint": fingerprint, "words": len(words)}) + "\n")
    replace_folder(partial, folder)
    print(f"text encoder: made a T5 stand-in of {len(words)} words in {folder}")
    return folder


def read_captions(sources: list[str]) -> list[str]:
    """The captions (.txt members) of local webdataset tars, named by globs, folders or `WEIGHT::glob`."""
    paths: list[str] = []
    for source in sources:
        pattern = source.split("::", 1)[-1]
        found = sorted(glob(os.path.join(pattern, "*.tar") if os.path.isdir(pattern) else pattern))
        if not found:
            raise ValueError(
                f"text_encoder.create reads captions from local tars; {pattern} matches none: prepare the data first"
            )
        paths += found
    captions = []
    for path in tqdm(paths, desc="reading captions", unit="shard", disable=len(paths) < 4):
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(".txt") else None
                    if file is not None:
                        captions.append(file.read().decode("utf-8", errors="replace"))
        except (tarfile.TarError, EOFError) as error:
            print(f"reading captions: {path} is damaged ({error}); its readable part is used")
    return captions


def count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs, after the tokenizer's own normalisation."""
    words: Counter[str] = Counter()
    normalizer = _normalizer()
    for caption in captions:
        words.update(normalizer.normalize_str(caption).split())
    if not words:
        raise ValueError("text_encoder.create: the training captions hold no words")
    return words


def create_stand_in_t5(words: Counter[str], config: StandInT5Config, folder: str | Path, seed: int) -> None:
    """Write a T5 encoder with random weights, and a tokenizer whose pieces are the captions' words, then letters.

    Args:
        words: occurrences of each word; the most frequent get a piece of their own, as far as the vocabulary goes.
        folder: a transformers folder: config.json, model.safetensors, tokenizer.json.
    """
    if config.width % config.heads:
        raise ValueError(f"text_encoder.create: width {config.width} is not a multiple of heads {config.heads}")
    tokenizer = _tokenizer(words, config.vocabulary)
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=4 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(t5)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _normalizer() -> normalizers.Normalizer:
    # Capitals carry nothing for a stand-in, and people type prompts either way.
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("’", "'"),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def _tokenizer(words: Counter[str], vocabulary: int) -> PreTrainedTokenizerFast:
    letters = sorted({chr(code) for code in range(33, 127)} | {letter for word in words for letter in word} | {"▁"})
    room = vocabulary - len(SPECIAL) - len(letters)
    if room < 1:
        raise ValueError(f"text_encoder.create: vocabulary {vocabulary} is too small for {len(letters)} letters and any word")
    kept = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:room]
    total = sum(words.values())
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"▁{word}", float(torch.tensor(count / total).log())) for word, count in kept]
    pieces += [(letter, LETTER_SCORE) for letter in letters]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
