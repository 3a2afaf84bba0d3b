"""Captions to text states: any T5, flan-T5 or ByT5 encoder, frozen (paper section 3.2: T5-XXL, 128 tokens).

Legend: L valid tokens of one caption with its end-of-sequence token, E width of the states.

Only the states of valid tokens leave this file: nothing downstream can attend to padding by mistake.
"""

import functools
import heapq
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from fluid_core.encoders.source import load_pretrained, weights_sha256
from fluid_core.planning import T5_TOKENS_PER_BATCH

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TextEncoder:
    """A frozen T5 encoder with its tokenizer."""

    def __init__(self, model: T5EncoderModel, tokenizer: Any, max_tokens: int, identity: dict[str, Any] | None = None):
        if max_tokens < 1:
            raise ValueError(f"text_encoder.max_tokens {max_tokens}: at least 1 is needed, for the end-of-sequence token")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.width: int = model.config.d_model
        self._identity = identity or {"path": None, "revision": None, "sha256": None}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        revision: str | None = None,
        max_tokens: int = 128,
        dtype: Literal["bf16", "fp32"] = "bf16",
        device: str | torch.device = "cpu",
    ) -> "TextEncoder":
        """Load a folder or hub id.

        Raises:
            ValueError: fp16 (T5's residual stream overflows it), nothing there, or weights missing.
        """
        if dtype not in DTYPES:
            reason = ": T5 overflows in fp16 and gives NaN" if dtype in ("fp16", "float16") else ""
            raise ValueError(f"text_encoder.dtype {dtype!r}{reason}; use bf16 or fp32")
        load = functools.partial(T5EncoderModel.from_pretrained, output_loading_info=True, dtype=DTYPES[dtype])
        model, folder, commit = load_pretrained(load, str(path), revision, "text_encoder")
        if model.config.model_type not in ("t5", "mt5"):
            raise ValueError(f"text_encoder: {path} is a {model.config.model_type}, not a T5, flan-T5 or ByT5 encoder")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        identity = {"path": str(path), "revision": commit, "sha256": weights_sha256(folder)}
        return cls(model.to(device), tokenizer, max_tokens, identity)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def tokenize_flagged(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids with the end-of-sequence token, and for each caption whether it was cut to max_tokens."""
        if not captions:
            return [], []
        whole = self.tokenizer(list(captions), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        cut = [len(ids) > self.max_tokens for ids in whole]
        eos = self.tokenizer.eos_token_id
        kept = self.max_tokens - 1
        return [[*ids[:kept], eos] if is_cut else list(ids) for ids, is_cut in zip(whole, cut, strict=True)], cut

    def tokenize(self, captions: list[str], cut: bool = True) -> list[list[int]]:
        """Token ids with the end-of-sequence token; too long captions are cut, or refused with `cut=False`.

        Raises:
            ValueError: `cut=False` and a caption has more than max_tokens tokens.
        """
        ids, flags = self.tokenize_flagged(captions)
        if not cut and any(flags):
            first = captions[flags.index(True)]
            raise ValueError(
                f"prompt longer than {self.max_tokens} tokens: {first[:60]!r}...; shorten it, or have it cut (truncate=True, --truncate)"
            )
        return ids

    @torch.no_grad()
    def encode_ids(self, ids: list[list[int]]) -> list[Tensor]:
        """Token ids -> states (L, E) of the valid tokens, in the encoder's dtype.

        Captions lie one after the other in rows of up to max_tokens tokens and are blind to each other. T5 knows only the distance
        between two tokens, so these are the states that a caption has alone, up to rounding; and one call reads the weights for
        many captions, of whatever lengths.
        """
        for index, caption in enumerate(ids):
            if not caption:
                raise ValueError(f"caption {index} has no tokens: even an empty caption has its end-of-sequence token")
        rows = _packed([len(caption) for caption in ids], self.max_tokens)
        width = max((sum(len(ids[i]) for i in row) for row in rows), default=1)
        step = max(1, T5_TOKENS_PER_BATCH // width)
        states: dict[int, Tensor] = {}
        for start in range(0, len(rows), step):
            states |= self._encode_rows(rows[start : start + step], width, ids)
        return [states[i] for i in range(len(ids))]

    def _encode_rows(self, rows: list[list[int]], width: int, ids: list[list[int]]) -> dict[int, Tensor]:
        """The states of the captions in some rows, by the caption's number."""
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        owner = torch.full((len(rows), width), -1)  # padding is a caption of its own
        places: dict[int, tuple[int, slice]] = {}
        for r, row in enumerate(rows):
            first = 0
            for i in row:
                place = slice(first, first + len(ids[i]))
                tokens[r, place], owner[r, place], places[i] = torch.tensor(ids[i]), i, (r, place)
                first = place.stop
        apart = owner[:, None, :, None] != owner[:, None, None, :]
        mask = None
        if apart.any():
            mask = torch.zeros(apart.shape, dtype=self.dtype).masked_fill_(apart, torch.finfo(self.dtype).min).to(self.device)
        out = self.model(input_ids=tokens.to(self.device), attention_mask=mask).last_hidden_state
        return {i: out[r, place] for i, (r, place) in places.items()}

    def encode(self, captions: list[str]) -> list[Tensor]:
        """Captions -> states (L, E) of the valid tokens; too long captions are cut."""
        return self.encode_ids(self.tokenize(captions))

    def identity(self) -> dict[str, Any]:
        """{"path", "revision", "sha256"}: what a manifest records, and what a bundle is checked against."""
        return dict(self._identity)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a transformers folder: model and tokenizer."""
        self.model.save_pretrained(str(path))
        self.tokenizer.save_pretrained(str(path))


def _packed(lengths: list[int], room: int) -> list[list[int]]:
    """Rows of captions with up to `room` tokens together: the longest first, each into the emptiest row; a longer one is alone."""
    rows: list[list[int]] = []
    emptiest: list[tuple[int, int]] = []  # a heap of (-room left, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left, row = emptiest[0] if emptiest else (0, 0)
        if emptiest and lengths[i] <= -left:
            heapq.heapreplace(emptiest, (left + lengths[i], row))
            rows[row].append(i)
        else:
            heapq.heappush(emptiest, (lengths[i] - room, len(rows)))
            rows.append([i])
    return rows
