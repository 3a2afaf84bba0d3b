"""The decoding engine: `start` prepares an image, `decode_step` takes any set of images one autoregressive step further.

Images in one call may differ in prompt, seed, step count, age, guidance and temperature; FluidPipeline steps a fixed set
together, the server lets images join and leave between steps. Whatever the company, an image's order and noise are a pure
function of its seed.

Shapes: B images, X trunk rows (one an image, two with guidance), N tokens, C channels, P tokens generated in this step,
L text tokens, E text width, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_core.diffusion.solvers import check_solver, solve
from fluid_core.generation.guidance import SCHEDULES, guidance_weight, guide
from fluid_core.model.fluid import FluidModel
from fluid_core.model.layers import padding_bias
from fluid_core.model.orders import ORDERS, first_stage, token_order, unmask_counts
from fluid_core.random import normal, sample_keys, uniform

# One stream for each use of an image's key; the last two are followed by one stream for each token.
_ORDER, _INITIAL_NOISE, _PER_TOKEN = 0, 1, 1 << 32


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One image. Texts are the text encoder's states of the valid tokens, (L, E).

    `negative_text_LE`: the states of the empty caption, or of a negative prompt; needed unless guidance_scale is 1.
    `known_tokens_NC` with `known_mask_N` (bool): tokens that are given and stay as they are (editing).
    """

    text_LE: Tensor
    negative_text_LE: Tensor | None
    seed: int
    num_steps: int
    head_steps: int
    guidance_scale: float
    guidance_schedule: str
    temperature: float
    solver: str
    grid: tuple[int, int]
    order: str = "random"
    known_tokens_NC: Tensor | None = None
    known_mask_N: Tensor | None = None

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0


class DecodeSlot:
    """The state of one image on its way. `tokens_NC`: normalised tokens fp32, or codes int64 (N,) of a discrete model."""

    def __init__(self, model: FluidModel, request: GenerationRequest):
        config, device = model.config, next(model.parameters()).device
        N = request.grid[0] * request.grid[1]
        self.request = request
        self.key_1 = sample_keys(request.seed, torch.zeros(1, dtype=torch.int64)).to(device)
        if config.tokens == "continuous":
            self.tokens_NC = torch.zeros(N, config.token_channels, device=device)
            self.noise_NC = normal(self.key_1, _INITIAL_NOISE, (N, config.token_channels))[0]
        else:
            self.tokens_NC = torch.zeros(N, dtype=torch.int64, device=device)
        self.known_N = torch.zeros(N, dtype=torch.bool, device=device)
        self.given_N: Tensor | None = None  # of an edit, on the model's device
        order_N = token_order("raster" if model.trunk.causal else request.order, self.key_1, request.grid, _ORDER)[0]
        if request.known_mask_N is not None and request.known_tokens_NC is not None:
            self.given_N = given_N = request.known_mask_N.to(device)
            self.tokens_NC[given_N] = request.known_tokens_NC.to(device, self.tokens_NC.dtype)[given_N]
            if not model.trunk.causal:
                self.known_N |= given_N
                order_N = order_N[~given_N[order_N]]
        self.order_N = order_N
        first = first_stage(order_N, request.grid) if request.order == "checkerboard" else 0
        steps = min(request.num_steps, len(order_N))
        self.counts = [1] * N if model.trunk.causal else unmask_counts(len(order_N), steps, first)
        self.step = 0
        self.batch: _Batch | None = None
        self.place = 0

    @property
    def done(self) -> bool:
        return self.step == len(self.counts)

    def next_places(self) -> Tensor:
        """The token positions that the next step generates: int64 (P,)."""
        first = sum(self.counts[: self.step])
        return self.order_N[first : first + self.counts[self.step]]


@dataclass
class _Batch:
    """What images that step together share: their text's keys and values, and in raster order the trunk's cache."""

    size: int
    rows: list[list[int]]  # each image's rows: [conditional] or [conditional, unconditional]
    text: Tensor  # (blocks, 2, X, H, L, d)
    text_mask_XL: Tensor
    cache: Tensor | None  # (blocks, 2, X, H, N, d)


def start(model: FluidModel, request: GenerationRequest) -> DecodeSlot:
    """Align the request's text, compute its keys and values for every block, and draw its order.

    Raises:
        ValueError: for an impossible request.
    """
    return start_batch(model, [request])[0]


@torch.no_grad()
def start_batch(model: FluidModel, requests: Sequence[GenerationRequest]) -> list[DecodeSlot]:
    """`start` for several requests with one pass through the aligner; a text object that several share is aligned once."""
    for request in requests:
        check_request(model, request)
    if len({tuple(request.grid) for request in requests}) > 1:
        raise ValueError("start_batch takes images of one grid")
    slots = [DecodeSlot(model, request) for request in requests]
    texts: list[Tensor] = []
    index: dict[int, int] = {}
    rows: list[list[int]] = []
    for request in requests:
        wanted = [request.text_LE, request.negative_text_LE] if request.guided else [request.text_LE]
        for text_LE in wanted:
            assert text_LE is not None
            if id(text_LE) not in index:
                index[id(text_LE)] = len(texts)
                texts.append(text_LE)
        rows.append([index[id(text_LE)] for text_LE in wanted])
    device = next(model.parameters()).device
    text_BLE = torch.nn.utils.rnn.pad_sequence([text.to(device, torch.float32) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    mask_BL = torch.arange(text_BLE.shape[1], device=device)[None] < lengths[:, None]
    pairs = model.trunk.text_keys_values(*model.aligner(text_BLE, mask_BL))
    unique = torch.stack([torch.stack(pair) for pair in pairs])
    flat = torch.tensor([row for image in rows for row in image], device=device)
    cache = None
    if model.trunk.causal:
        blocks, _, _, H, _, d = unique.shape
        N = len(slots[0].known_N)
        cache = unique.new_zeros(blocks, 2, len(flat), H, N, d)
    batch = _Batch(len(slots), _number(rows), unique[:, :, flat], mask_BL[flat], cache)
    for place, slot in enumerate(slots):
        slot.batch, slot.place = batch, place
    return slots


def _number(rows: list[list[int]]) -> list[list[int]]:
    ends = torch.tensor([len(image) for image in rows]).cumsum(0).tolist()
    return [list(range(end - len(image), end)) for image, end in zip(rows, ends, strict=True)]


def _join(slots: Sequence[DecodeSlot]) -> _Batch:
    """The batch of exactly these images in this order: the one they are in, or a new one from the rows of their old ones."""
    first = slots[0].batch
    assert first is not None
    if len(slots) == first.size and all(slot.batch is first and slot.place == i for i, slot in enumerate(slots)):
        return first
    texts, masks, caches, rows = [], [], [], []
    for slot in slots:
        old = slot.batch
        assert old is not None
        own = old.rows[slot.place]
        length = int(old.text_mask_XL[own].sum(1).max())
        texts.append(old.text[:, :, own, :, :length])
        masks.append(old.text_mask_XL[own, :length])
        if old.cache is not None:
            caches.append(old.cache[:, :, own])
        rows.append(own)
    longest = max(mask.shape[1] for mask in masks)
    batch = _Batch(
        size=len(slots),
        rows=_number(rows),
        text=torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[4])) for text in texts], dim=2),
        text_mask_XL=torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]),
        cache=torch.cat(caches, dim=2) if caches else None,
    )
    for place, slot in enumerate(slots):
        slot.batch, slot.place = batch, place
    return batch


@torch.no_grad()
def decode_step(model: FluidModel, slots: Sequence[DecodeSlot]) -> None:
    """One autoregressive step for each image. They must share grid, solver and head_steps, and none may be done."""
    if not slots:
        return
    first = slots[0].request
    for slot in slots:
        same = (slot.request.grid, slot.request.solver, slot.request.head_steps) == (first.grid, first.solver, first.head_steps)
        if not same or slot.done:
            raise ValueError("decode_step takes unfinished images of one grid, solver and head_steps")
    batch = _join(slots)
    places = [slot.next_places() for slot in slots]
    conditions = _causal_conditions if model.trunk.causal else _masked_conditions
    z_XPD = conditions(model, slots, batch, places)
    conditional = [z_XPD[rows[0], : len(place)] for rows, place in zip(batch.rows, places, strict=True)]
    unconditional = [z_XPD[rows[-1], : len(place)] for rows, place in zip(batch.rows, places, strict=True)]
    values = _sample(model, slots, places, torch.cat(conditional), torch.cat(unconditional))
    for slot, place, value in zip(slots, places, values.split([len(p) for p in places]), strict=True):
        if model.trunk.causal and slot.given_N is not None and bool(slot.given_N[place]):
            value = slot.tokens_NC[place]  # raster editing: a given token is walked over, not generated
        slot.tokens_NC[place] = value
        slot.known_N[place] = True
        slot.step += 1


def _masked_conditions(model: FluidModel, slots: Sequence[DecodeSlot], batch: _Batch, places: list[Tensor]) -> Tensor:
    """z (X, P, D) of each image's next places, from all its known tokens; images with fewer places repeat their first."""
    repeats = torch.tensor([len(rows) for rows in batch.rows], device=slots[0].known_N.device)
    tokens = torch.stack([slot.tokens_NC for slot in slots]).repeat_interleave(repeats, dim=0)
    hidden = (~torch.stack([slot.known_N for slot in slots])).repeat_interleave(repeats, dim=0)
    text = [(pair[0], pair[1]) for pair in batch.text]
    most = max(len(place) for place in places)
    wanted = torch.stack([torch.cat((place, place[:1].expand(most - len(place)))) for place in places])
    wanted = wanted.repeat_interleave(repeats, dim=0)
    return model.trunk(tokens, hidden, slots[0].request.grid, text, padding_bias(batch.text_mask_XL), wanted)


def _causal_conditions(model: FluidModel, slots: Sequence[DecodeSlot], batch: _Batch, places: list[Tensor]) -> Tensor:
    """z (X, 1, D) of each image's next place; the keys and values of the places before it come from the cache."""
    assert batch.cache is not None
    device = slots[0].known_N.device
    repeats = torch.tensor([len(rows) for rows in batch.rows], device=device)
    ages = torch.tensor([slot.step for slot in slots], device=device).repeat_interleave(repeats)
    tokens = torch.stack([slot.tokens_NC[max(slot.step - 1, 0)] for slot in slots])[:, None].repeat_interleave(repeats, dim=0)
    text = [(pair[0], pair[1]) for pair in batch.text]
    return model.trunk.step(tokens, ages, slots[0].request.grid, text, padding_bias(batch.text_mask_XL), batch.cache)


def _sample(model: FluidModel, slots: Sequence[DecodeSlot], places: list[Tensor], z_PD: Tensor, other_PD: Tensor) -> Tensor:
    """New token values (P, C), or codes (P,), from the conditions with and without the caption."""
    config, device = model.config, z_PD.device
    counts = torch.tensor([len(place) for place in places], device=device)

    def each(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(counts)[:, None]

    weight_P1 = each([_weight(slot) for slot in slots])
    temperature_P1 = each([slot.request.temperature for slot in slots])
    guided = any(slot.request.guided for slot in slots)
    if config.tokens == "discrete":
        scores_PV = model.trunk.embed(model.head(z_PD), logits=True)
        if guided:
            scores_PV = guide(scores_PV, model.trunk.embed(model.head(other_PD), logits=True), weight_P1, scores_PV.shape[1])
        return _sample_codes(slots, places, scores_PV / temperature_P1)
    request, channels = slots[0].request, config.token_channels
    conditions = model.head.embed_condition(torch.cat((z_PD, other_PD)) if guided else z_PD)

    def predict(x_PC: Tensor, step: float) -> Tensor:
        noisy = torch.cat((x_PC, x_PC)) if guided else x_PC
        out = model.head(noisy, torch.full((1,), step, device=device), conditions)  # full: no copy that a GPU waits for
        if not guided:
            return out
        conditional, unconditional = out.chunk(2)
        return guide(conditional, unconditional, weight_P1, channels)

    initial_PC = torch.cat([slot.noise_NC[place] for slot, place in zip(slots, places, strict=True)])
    # Only ddpm asks for noise at every step.
    noise_SPC = _step_noise(slots, places, request.head_steps, channels) if request.solver == "ddpm" else torch.empty(0)
    return solve(
        config.objective,
        request.solver,
        predict,
        initial_PC,
        request.head_steps,
        temperature_P1,
        step_noise=lambda i: noise_SPC[i],
    )


def _weight(slot: DecodeSlot) -> float:
    request, N = slot.request, len(slot.known_N)
    known = N - len(slot.order_N) + sum(slot.counts[: slot.step + 1])  # given ones, and those that exist after this step
    return guidance_weight(request.guidance_schedule, request.guidance_scale, known, N)


def _step_noise(slots: Sequence[DecodeSlot], places: list[Tensor], head_steps: int, channels: int) -> Tensor:
    """The noise of every ddpm step (S, P, C): for each token from its image's key and its own place. Drawn image by image,
    so that the shapes, and with them the last bits of log and cos, do not depend on the company."""
    parts = [
        normal(slot.key_1.expand(len(place)), _PER_TOKEN + place, (head_steps, channels))
        for slot, place in zip(slots, places, strict=True)
    ]
    return torch.cat(parts).transpose(0, 1)


def _sample_codes(slots: Sequence[DecodeSlot], places: list[Tensor], scores_PV: Tensor) -> Tensor:
    """Codes (P,) by the Gumbel-max rule with each token's own uniform draws."""
    V = scores_PV.shape[1]
    parts = [
        uniform(slot.key_1.expand(len(place)), _PER_TOKEN + place, (V,)) for slot, place in zip(slots, places, strict=True)
    ]
    return (scores_PV - (-torch.cat(parts).log()).log()).argmax(dim=1)


def check_request(model: FluidModel, request: GenerationRequest) -> None:
    """Raise ValueError with what to do for a request that this model cannot serve."""
    config = model.config
    if len(request.grid) != 2 or not all(isinstance(side, Integral) and side >= 1 for side in request.grid):
        raise ValueError(f"grid must be two whole numbers of at least 1, got {request.grid!r}")
    N = request.grid[0] * request.grid[1]
    for name in ("num_steps", "head_steps", "seed"):
        if not isinstance(getattr(request, name), Integral) or isinstance(getattr(request, name), bool):
            raise ValueError(f"{name} must be a whole number, got {getattr(request, name)!r}")
    for name in ("guidance_scale", "temperature"):
        value = getattr(request, name)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    for name, text in (("text", request.text_LE), ("negative text", request.negative_text_LE)):
        if text is None and name == "negative text":
            if request.guided:
                raise ValueError("guidance needs negative_text_LE: the text encoder's states of the empty caption")
            continue
        if not isinstance(text, Tensor) or not text.is_floating_point():
            kind = text.dtype if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"{name} must be a floating-point tensor, got {kind}")
        if text.ndim != 2 or text.shape[1] != config.text_width or not 1 <= len(text) <= config.max_text_tokens:
            raise ValueError(
                f"{name} must be (1..{config.max_text_tokens} tokens, {config.text_width}), got {tuple(text.shape)}"
            )
        if not bool(torch.isfinite(text).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    if request.order not in ORDERS:
        raise ValueError(f"unknown order {request.order!r}; one of {', '.join(ORDERS)}")
    if request.guidance_schedule not in SCHEDULES:
        raise ValueError(f"unknown guidance_schedule {request.guidance_schedule!r}; one of {', '.join(SCHEDULES)}")
    if request.guidance_scale < 0 or request.temperature <= 0:
        raise ValueError(
            f"guidance_scale must be at least 0 and temperature above 0, got {request.guidance_scale} and {request.temperature}"
        )
    if not 1 <= request.num_steps <= N:
        h, w = request.grid
        raise ValueError(f"num_steps must be between 1 and the {N} tokens of a {h}x{w} grid, got {request.num_steps}")
    if config.tokens == "continuous":
        check_solver(config.objective, request.solver, request.head_steps)
    if (request.known_mask_N is None) != (request.known_tokens_NC is None):
        raise ValueError("known_tokens_NC and known_mask_N go together")
    if request.known_mask_N is not None and request.known_tokens_NC is not None:
        wanted = (N, config.token_channels) if config.tokens == "continuous" else (N,)
        if request.known_mask_N.shape != (N,) or request.known_mask_N.dtype != torch.bool:
            mask = request.known_mask_N
            raise ValueError(f"known_mask_N must be bool ({N},), got {mask.dtype} {tuple(mask.shape)}")
        if tuple(request.known_tokens_NC.shape) != wanted:
            raise ValueError(f"known_tokens_NC must be {wanted}, got {tuple(request.known_tokens_NC.shape)}")
        if request.known_tokens_NC.is_floating_point() != (config.tokens == "continuous"):
            kind = "floating-point" if config.tokens == "continuous" else "int64"
            raise ValueError(f"known_tokens_NC must be {kind} for {config.tokens} tokens, got {request.known_tokens_NC.dtype}")
        if bool(request.known_mask_N.all()):
            raise ValueError("every token is known: there is nothing to generate")
        given = request.known_tokens_NC[request.known_mask_N]
        if config.tokens == "continuous" and not bool(torch.isfinite(given).all()):
            raise ValueError("known_tokens_NC has NaN or infinite values where known_mask_N is True")
        if config.tokens == "discrete" and not bool(((given >= 0) & (given < config.codebook_size)).all()):
            raise ValueError(
                f"known_tokens_NC must hold codes below {config.codebook_size}, got {int(given.min())} to {int(given.max())}"
            )
