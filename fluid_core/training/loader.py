"""The loader: encoded rows to batches, in the order of fluid_core/training/order.py, the same at any world size.

Every worker reads only what it needs: of each shuffle window it keeps the rows that its own slices of the batches hold.
What is random for a sample (posterior sample, flip, mask, timesteps, noise, caption dropout) is drawn from its key.

Shapes: B samples of a micro-batch, N tokens, C token channels, L text tokens, E text width, H W latent height and width.
"""

import contextlib
import hashlib
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluid_core.config import ModelConfig
from fluid_core.latents.manifest import Manifest
from fluid_core.latents.reader import EncodedDataset, Rows
from fluid_core.model.draws import TrainingDraws, draw_training
from fluid_core.model.tokens import check_finite, normalise, patchify
from fluid_core.random import normal, sample_keys, uniform
from fluid_core.training.order import DatasetOrder, MixtureOrder, derive_key

# Streams of a sample's key; the model's own draws use small numbers.
POSTERIOR, FLIP = 1001, 1002
CACHE_BYTES = 2 << 30
CLOSE_SECONDS = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")

EncodeIds = Callable[[list[list[int]]], list[Tensor]]
"""A frozen text encoder: token ids of captions to their states, valid tokens only."""


@dataclass
class Batch:
    """One micro-batch. `positions` are the global positions of its samples; `key_hashes` identify their rows (int64)."""

    keys: list[str]
    positions: list[int]
    key_hashes: Tensor
    tokens: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor
    draws: TrainingDraws

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            tokens=move(self.tokens),
            text_BLE=move(self.text_BLE),
            text_mask_BL=move(self.text_mask_BL),
            draws=self.draws.to(device),
        )


class Slicing:
    """Which positions of a global batch belong to which worker: micro-batch by micro-batch, in slices of micro_batch_size."""

    def __init__(self, batch_size: int, rank: int, world_size: int, micro_batch_size: int | None):
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        if batch_size % world_size:
            raise ValueError(
                f"training.batch_size {batch_size} is not a multiple of {world_size} workers: change one of the two"
            )
        self.micro = micro_batch_size or batch_size // world_size
        if batch_size % (self.micro * world_size):
            raise ValueError(
                f"training.batch_size {batch_size} is not a multiple of {world_size} workers x micro_batch_size {self.micro}"
            )

    def mine(self, positions: np.ndarray) -> np.ndarray:
        """bool: which global positions this worker computes."""
        return (positions % self.batch_size) % (self.micro * self.world_size) // self.micro == self.rank

    def check_start(self, position: int) -> None:
        """Raises ValueError: no global batch begins at `position`. Rows would be left out or come twice from there on."""
        if position % self.batch_size:
            raise ValueError(
                f"training.batch_size {self.batch_size} does not divide the {position} samples that the checkpoint has seen: "
                "resume with a batch size that does"
            )

    def micro_batches(self, start: int) -> list[range]:
        """This worker's positions in the batch that begins at `start`."""
        stride = self.micro * self.world_size
        first = start + self.rank * self.micro
        return [range(first + k, first + k + self.micro) for k in range(0, self.batch_size, stride)]


class _Source:
    """One data set of the mixture: windows held in memory, the next one being read ahead."""

    def __init__(
        self, dataset: EncodedDataset, index: int, order: DatasetOrder, mixture: MixtureOrder, slicing: Slicing, seed: int
    ):
        self.dataset, self.index, self.order = dataset, index, order
        self._mixture, self._slicing, self._seed = mixture, slicing, seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fluid-window")
        self._windows: OrderedDict[tuple[int, int], Future[dict[int, tuple[Rows, int]]]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._cached = 0

    def row(self, position: int) -> tuple[Rows, int]:
        """The rows that hold the data set's `position`, and its index in them."""
        epoch, number = self.order.window_of(position)
        window = self._window(epoch, number)
        following = (epoch, number + 1) if number + 1 < len(self.order.windows(epoch)) else (epoch + 1, 0)
        if len(self.order.windows(epoch)) > 1 or following[0] == epoch:
            self._window(*following)
        return window.result()[position]

    def _window(self, epoch: int, number: int) -> "Future[dict[int, tuple[Rows, int]]]":
        # Not looked up a second time: a thread of a stream that was closed may take windows out as well.
        window = self._windows.get((epoch, number))
        if window is None:
            window = self._windows[epoch, number] = self._reader.submit(self._load, epoch, number)
            while len(self._windows) > 3:
                self._windows.popitem(last=False)
        return window

    def _load(self, epoch: int, number: int) -> dict[int, tuple[Rows, int]]:
        window = self.order.windows(epoch)[number]
        start = epoch * self.order.rows + window.start
        mine = self._slicing.mine(self._mixture.global_positions(self.index, start, start + window.rows))
        places = self.order.places(epoch, number)
        position_of = np.full(window.rows, -1, dtype=np.int64)
        position_of[places[mine]] = start + np.flatnonzero(mine)
        held: dict[int, tuple[Rows, int]] = {}
        first = 0
        for shard, group, rows in window.groups:
            wanted = position_of[first : first + rows]
            first += rows
            local = np.flatnonzero(wanted >= 0)
            if len(local):
                data, kept = self._read(epoch, shard, group, local)
                held.update((int(wanted[i]), (data, int(k))) for i, k in zip(local, kept, strict=True))
        return held

    def _read(self, epoch: int, shard: int, group: int, local: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Rows that contain the rows `local` of a group, and where they are in them. Small data sets stay in memory whole."""
        if (shard, group) in self._groups:
            return self._groups[shard, group], local
        several = False

        def choose(key: str, captions: int) -> int:
            nonlocal several
            several = several or captions > 1
            return derive_key("caption", self._seed, epoch, key) % captions

        data = self.dataset.read_group(shard, group, choose_caption=choose)
        size = _bytes(data)
        if not several and self._cached + size <= CACHE_BYTES:
            self._groups[shard, group] = data
            self._cached += size
            return data, local
        return _select(data, local), np.arange(len(local))


class Loader:
    """Batches of one worker.

    Args:
        datasets: (data set, weight) pairs; all must have passed `check_datasets`.
        from_steps: the step at which each joins the mixture; all from the start by default.
        encode_ids: needed for data sets of token ids alone (`text_mode: tokens`).
    """

    def __init__(
        self,
        datasets: list[tuple[EncodedDataset, float]],
        model: ModelConfig,
        seed: int,
        slicing: Slicing,
        window: int = 65_536,
        encode_ids: EncodeIds | None = None,
        collator: "Collator | None" = None,
        from_steps: Sequence[int] = (),
    ):
        self.slicing = slicing
        begins = [step * slicing.batch_size for step in from_steps]
        self._mixture = MixtureOrder([weight for _, weight in datasets], seed, begins)
        self._sources = [
            _Source(data, i, DatasetOrder(data.row_groups, data.manifest.hash, seed, window), self._mixture, slicing, seed)
            for i, (data, _) in enumerate(datasets)
        ]
        self.rows = sum(source.order.rows for source in self._sources)
        self.collator = collator or Collator(datasets[0][0].manifest, model, encode_ids)
        self._seed = seed

    def epoch(self, position: int) -> float:
        """How often the first data set has been seen at a global position (for the log)."""
        return self._mixture.seen(0, position) / max(1, self._sources[0].order.rows)

    def phase(self, position: int) -> int:
        """How many times data sets have joined the mixture (`from_step`) at a global position."""
        return self._mixture.phase(position)

    def batches(self, start: int) -> list[Batch]:
        """This worker's micro-batches of the global batch that begins at position `start`."""
        out = []
        for positions in self.slicing.micro_batches(start):
            located = [self._mixture.locate(p) for p in positions]
            rows = [self._sources[dataset].row(position) for dataset, position in located]
            out.append(self.collator(rows, list(positions), sample_keys(self._seed, torch.tensor(list(positions)))))
        return out

    def stream(self, start: int, prefetch: int = 2) -> Generator[list[Batch], None, None]:
        """Batches from the global position `start` on, prepared by a thread `prefetch` global batches ahead. An error there is
        raised here.

        Raises:
            ValueError: `start` is no multiple of the batch size.
        """
        self.slicing.check_start(start)
        return read_ahead((self.batches(position) for position in count(start, self.slicing.batch_size)), prefetch)


def read_ahead(batches: Iterator[list[Batch]], prefetch: int) -> Generator[list[Batch], None, None]:
    """The same endless batches, prepared by a thread `prefetch` items ahead. An error there is raised here.

    Closing it waits for the batch in preparation: the stream that follows a roll-back shares the windows and the text encoder's
    memory with it. It waits CLOSE_SECONDS at most, because Ray Data may keep a thread until other workers read on.
    """
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(prefetch)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                ready.put(next(batches))
            except BaseException as error:
                ready.put(error)
                return

    thread = threading.Thread(target=work, daemon=True, name="fluid-loader")
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()  # room for the one batch that is still to come
        thread.join(CLOSE_SECONDS)


class Collator:
    """Rows to a Batch: posterior samples, normalised tokens, padded text, and the draws of the training step."""

    def __init__(self, manifest: Manifest, model: ModelConfig, encode_ids: EncodeIds | None = None):
        self.model = model
        self.mean, self.std = manifest.latent_mean, manifest.latent_std
        self._encode_ids = encode_ids
        if manifest.text_mode == "embeddings":
            self.null_text_LE = manifest.null_embedding()
        elif encode_ids is not None:
            self.null_text_LE = encode_ids([[int(i) for i in manifest.null_text["token_ids"]]])[0].cpu()
        else:
            raise ValueError("this data set holds token ids alone (text.mode: tokens): a text encoder is needed to train on it")
        if not bool(torch.isfinite(self.null_text_LE).all()):
            raise ValueError("the states of the empty caption are NaN or infinite: the text encoder is broken")

    def __call__(self, rows: list[tuple[Rows, int]], positions: list[int], keys_B: Tensor) -> Batch:
        """`keys_B`: int64, each sample's key for everything random about it."""
        names = [data.keys[i] for data, i in rows]
        hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True) for name in names]
        text_BLE, text_mask_BL = self._text(rows)
        draws = draw_training(self.model, keys_B, self.model.num_tokens)
        tokens = self._tokens(rows, keys_B)
        check_finite(names, tokens, text_BLE)
        if not tokens.is_floating_point() and int(tokens.max()) >= self.model.codebook_size:
            wrong = names[int(tokens.amax(dim=1).argmax())]
            raise ValueError(
                f"sample {wrong!r} has code {int(tokens.max())}, but model.codebook_size is {self.model.codebook_size}: "
                "set it to the image tokenizer's number of codes"
            )
        return Batch(names, positions, torch.tensor(hashes), tokens, text_BLE, text_mask_BL, draws)

    def _tokens(self, rows: list[tuple[Rows, int]], keys_B: Tensor) -> Tensor:
        flip_B = uniform(keys_B, FLIP, ()) < 0.5
        name = "codes" if self.model.tokens == "discrete" else "moments"
        values = []
        for (data, i), flip in zip(rows, flip_B.tolist(), strict=True):
            mirrored = getattr(data, f"{name}_flip")
            values.append((mirrored if flip and mirrored is not None else getattr(data, name))[i])
        stacked = torch.stack(values)
        if name == "codes":
            return stacked.flatten(1).long()
        mean, logvar = stacked.float().chunk(2, dim=1)
        noise = normal(keys_B, POSTERIOR, mean.shape[1:])
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        return patchify(normalise(latents, self.mean, self.std), self.model.patch)

    def _text(self, rows: list[tuple[Rows, int]]) -> tuple[Tensor, Tensor]:
        if self._encode_ids is not None:
            states = self._encode_ids([[int(t) for t in data.token_ids[i]] for data, i in rows])
        else:
            states = [data.text[i] for data, i in rows if data.text is not None]
        longest = max(len(s) for s in states)
        length = min(-(-longest // 8) * 8, max(longest, self.model.max_text_tokens))
        text = torch.zeros(len(states), length, states[0].shape[1], dtype=states[0].dtype)
        mask = torch.zeros(len(states), length, dtype=torch.bool)
        for k, s in enumerate(states):
            text[k, : len(s)] = s.cpu()
            mask[k, : len(s)] = True
        return text, mask


def check_datasets(
    datasets: list[tuple[EncodedDataset, float]], model: ModelConfig, identities: dict[str, dict[str, Any]]
) -> None:
    """Refuse data that does not belong to the recipe, naming the difference.

    Args:
        identities: of the recipe's encoders, {"image": {...}, "text": {...}}: `sha256` is compared where both have one, else
            `path` (and `revision`, between commits) of a recipe that names a hub id.
    """
    first = datasets[0][0]
    for data, _ in datasets:
        m, where = data.manifest, f"{data.root}/manifest.json"
        kind = "vq" if model.tokens == "discrete" else "kl"
        if m.kind != kind:
            raise ValueError(f"{where}: kind {m.kind} does not go with model.tokens {model.tokens}")
        side = model.grid * (1 if kind == "vq" else model.patch)
        wanted = [side, side] if kind == "vq" else [model.latent_channels, side, side]
        if list(m.latent_shape) != wanted:
            raise ValueError(
                f"{where}: latent shape {m.latent_shape}, but the model (grid {model.grid}, patch {model.patch}, "
                f"latent_channels {model.latent_channels}) needs {wanted}"
            )
        if any(shard.shapes for shard in m.shards):
            raise ValueError(f"{where}: training needs square latents of one size; encode with encode.buckets: false")
        text = m.encoders.get("text", {})
        if int(text.get("width", model.text_width)) != model.text_width:
            raise ValueError(f"{where}: text width {text.get('width')}, but model.text_width is {model.text_width}")
        if int(text.get("max_tokens", 0)) > model.max_text_tokens:
            raise ValueError(
                f"{where}: captions of up to {text['max_tokens']} tokens, but model.max_text_tokens is {model.max_text_tokens}"
            )
        for name in ("image", "text"):
            theirs = m.encoders.get(name, {}).get("sha256")
            ours = identities.get(name, {}).get("sha256") or first.manifest.encoders.get(name, {}).get("sha256")
            if theirs and ours and theirs != ours:
                raise ValueError(
                    f"{where}: encoded with another {name} encoder (sha256 {theirs[:12]}, the recipe's is {ours[:12]}): encode again"
                )
            for key in ("path", "revision"):
                theirs, ours = m.encoders.get(name, {}).get(key), identities.get(name, {}).get(key)
                # A manifest holds the commit; a branch or tag in the recipe does not tell which one it means.
                unknown = key == "revision" and not (theirs and ours and _COMMIT.fullmatch(theirs) and _COMMIT.fullmatch(ours))
                if theirs and ours and theirs != ours and not unknown:
                    raise ValueError(
                        f"{where}: encoded with another {name} encoder ({key} {theirs}, the recipe's is {ours}): encode again, or "
                        "name the one that it was encoded with"
                    )
        reference = first.manifest
        for name, ours, theirs in (
            ("std", m.latent_std, reference.latent_std), ("mean", m.latent_mean, reference.latent_mean),
        ):  # fmt: skip
            if len(ours) != len(theirs) or any(
                abs(a - b) > 0.25 * std for a, b, std in zip(ours, theirs, reference.latent_std, strict=True)
            ):
                raise ValueError(f"{where}: latent {name} {ours} is not that of {first.root} {theirs}")
        if m.text_mode != first.manifest.text_mode:
            raise ValueError(f"{where}: text mode {m.text_mode}, but {first.root} has {first.manifest.text_mode}")
        if not len(data):
            raise ValueError(f"{where}: the data set is empty")


def _bytes(rows: Rows) -> int:
    tensors = [t for t in (rows.moments, rows.moments_flip, rows.codes, rows.codes_flip, *(rows.text or [])) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors) + 400 * len(rows)


def _select(rows: Rows, index: np.ndarray) -> Rows:
    chosen = index.tolist()

    def pick(values: Any) -> Any:
        if values is None or isinstance(values, Tensor):
            return None if values is None else values[torch.from_numpy(index)]
        return [values[i] for i in chosen] if len(values) else values

    return Rows(**{name: pick(value) for name, value in vars(rows).items()})
