"""The parts that the aligner, the trunk and the head share: linear layers, attention, MLP.

Every module initialises its own parameters inside its constructor, so that models can be built on the meta device or under
`deepspeed.zero.Init`, which takes each module's parameters apart as soon as its constructor returns.

Shapes: B batch, N queries, M keys, D width, H heads, d = D / H.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn

_EXPLICIT_MAX_KEYS = {torch.float32: 64, torch.bfloat16: 256}
"""Up to this many keys plain matmuls beat the fused kernel on CPU, or do as well (`python -m benchmarks.run model`)."""


class Linear(nn.Linear):
    """Xavier-uniform weights and zero bias (MAR)."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def on_cpu(x: Tensor) -> bool:
    """False for the planner's tensors too: they are on no device and stand for a GPU's."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)


def attend(q_BHNd: Tensor, k_BHMd: Tensor, v_BHMd: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v -> (B, H, N, d).

    `bias`: additive, broadcasts to (B, H, N, M); -inf hides a key. This is the only place that chooses a kernel: the fused
    one, or plain matmuls for few keys on CPU.
    """
    if on_cpu(q_BHNd) and k_BHMd.shape[2] <= _EXPLICIT_MAX_KEYS.get(k_BHMd.dtype, 0):
        logits_BHNM = torch.matmul(q_BHNd * (1.0 / math.sqrt(q_BHNd.shape[-1])), k_BHMd.transpose(-1, -2))
        if bias is not None:
            logits_BHNM = logits_BHNM + bias.to(logits_BHNM.dtype)
        return torch.matmul(logits_BHNM.softmax(dim=-1), v_BHMd)
    mask = None if bias is None else bias.to(q_BHNd.dtype)
    return F.scaled_dot_product_attention(q_BHNd, k_BHMd, v_BHMd, attn_mask=mask)


def padding_bias(mask_BL: Tensor) -> Tensor:
    """0 where `mask` (bool) is True and -inf elsewhere: fp32 (B, 1, 1, L)."""
    return torch.zeros(mask_BL.shape, device=mask_BL.device).masked_fill(~mask_BL, -math.inf)[:, None, None, :]


class Packing:
    """Which places of a padded text (B, L) are valid, in one row (T): what is computed place by place skips the padding.

    A batch is padded to its longest caption, and most captions are much shorter. With `ragged` attention takes the rows as they
    are, each of its own length, by a kernel that is there for GPUs and half precision alone; without, padded again, with a bias.
    """

    def __init__(self, mask_BL: Tensor, ragged: bool = False):
        self.shape = mask_BL.shape
        self.ragged = ragged
        self.starts = F.pad(mask_BL.sum(1).cumsum(0), (1, 0)).int()  # (B + 1), each text's first place in the row
        if isinstance(mask_BL, FakeTensor):  # the planner counts shapes, without values: all places are taken as valid
            self.places_T = torch.arange(mask_BL.numel(), device=mask_BL.device)
        else:
            self.places_T = mask_BL.flatten().nonzero()[:, 0]

    def pack(self, x_BLD: Tensor) -> Tensor:
        """The valid places (T, D)."""
        return x_BLD.flatten(0, 1)[self.places_T]

    def unpack(self, x_TD: Tensor) -> Tensor:
        """(B, L, D) with zeros in the padding."""
        B, L = self.shape
        return x_TD.new_zeros(B * L, x_TD.shape[1]).index_copy(0, self.places_T, x_TD).view(B, L, -1)

    def attend(self, q_SHd: Tensor, k_THd: Tensor, v_THd: Tensor, queries: int | None = None) -> Tensor:
        """Ragged attention of each text's queries to its own places: (S, H, d). `queries` of each text, or its places (S = T)."""
        B, L = self.shape
        starts = self.starts
        if queries is not None:
            starts = torch.arange(0, B * queries + 1, queries, device=starts.device, dtype=torch.int32)
        out = varlen_attn(q_SHd, k_THd, v_THd, starts, self.starts, L if queries is None else queries, L)
        assert isinstance(out, Tensor)  # and not with its statistics, which must be asked for
        return out


def causal_bias(num_tokens: int, device: torch.device) -> Tensor:
    """0 for keys at or before the query and -inf after it: fp32 (N, N)."""
    return torch.full((num_tokens, num_tokens), -math.inf, device=device).triu(1)


class Cache:
    """Keys and values of the places generated so far, for one block of the causal trunk: storage (2, B, H, N, d).

    Rows may be of different ages: row b adds the place `ages[b]`; the caller's bias hides what is beyond it.
    """

    def __init__(self, storage: Tensor, ages_B: Tensor, length: int):
        self.storage, self.ages_B, self.length = storage, ages_B, length

    def append(self, k_BH1d: Tensor, v_BH1d: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new place for each row; returns the keys and values of the first `length` places."""
        rows = torch.arange(len(self.ages_B), device=self.ages_B.device)
        self.storage[0][rows, :, self.ages_B] = k_BH1d[:, :, 0].to(self.storage.dtype)
        self.storage[1][rows, :, self.ages_B] = v_BH1d[:, :, 0].to(self.storage.dtype)
        return self.storage[0, :, :, : self.length], self.storage[1, :, :, : self.length]


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys: layer norm without affine, then one learned gain for both."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.gain = nn.Parameter(torch.ones(width // heads))
        self.out = Linear(width, width)

    def forward(
        self,
        x_BND: Tensor,
        bias: Tensor | None = None,
        cache: Cache | None = None,
        places_BP: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, N, D); with `places_BP` only the outputs of those places, (B, P, D). With `packing` (T, D) to (T, D)."""
        if packing is not None and packing.ragged:
            q, k, v = self.qkv(x_BND).view(len(x_BND), 3, self.heads, -1).unbind(1)
            return self.out(packing.attend(unit_norm(q) * self.gain.to(q.dtype), unit_norm(k), v).flatten(1))
        qkv = self.qkv(x_BND) if packing is None else packing.unpack(self.qkv(x_BND))
        B, N = qkv.shape[:2]
        D = x_BND.shape[-1]
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).unbind(2)
        if places_BP is not None:
            q, N = q.take_along_dim(places_BP[:, :, None, None], dim=1), places_BP.shape[1]
        q, k = unit_norm(q) * self.gain.to(q.dtype), unit_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        attended = attend(q, k, v, bias).transpose(1, 2).reshape(B, N, D)
        return self.out(attended if packing is None else packing.pack(attended))


class CrossAttention(nn.Module):
    """Attention of image tokens to the aligned text. Keys and values depend on the text alone: compute them once."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.gain = nn.Parameter(torch.ones(width // heads))
        self.out = Linear(width, width)

    def keys_values(self, text_TD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Of the text's valid places (T, D): keys and values, each (B, H, L, d); of a ragged packing each (T, H, d)."""
        if packing.ragged:
            k, v = self.kv(text_TD).view(len(text_TD), 2, self.heads, -1).unbind(1)
            return unit_norm(k), v
        B, L = packing.shape
        kv_BLD = packing.unpack(self.kv(text_TD))
        k, v = kv_BLD.view(B, L, 2, self.heads, -1).unbind(2)
        return unit_norm(k).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x_BND: Tensor, keys_values: tuple[Tensor, Tensor], hidden: Tensor | Packing | None) -> Tensor:
        """(B, N, D). `hidden`: the bias that hides the padding, or the ragged packing that has none."""
        B, N, D = x_BND.shape
        q = self.q(x_BND).view(B, N, self.heads, D // self.heads)
        q = unit_norm(q) * self.gain.to(q.dtype)
        if isinstance(hidden, Packing):
            return self.out(hidden.attend(q.flatten(0, 1), *keys_values, queries=N).view(B, N, D))
        out = attend(q.transpose(1, 2), *keys_values, hidden)
        return self.out(out.transpose(1, 2).reshape(B, N, D))


def unit_norm(x: Tensor) -> Tensor:
    """Layer norm without affine over the last dimension. Root-mean-square would do as well, but has no fused CPU kernel:
    with it a training step of the demo's model took 1.18 times as long (docs/journal.md)."""
    with torch.autocast(x.device.type, enabled=False):  # on GPUs it would return fp32; the sums are fp32 in any case
        return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


class MLP(nn.Module):
    """Linear - GELU - Linear, four times the width inside."""

    def __init__(self, width: int):
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))
