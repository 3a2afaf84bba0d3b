"""Text embeddings as bytes: bf16, or int8 with one absmax scale a token (half the bytes, cosine reported by the encoder)."""

import numpy as np
import torch
from torch import Tensor


def pack_embedding(embedding_LE: Tensor, dtype: str) -> bytes:
    """Valid tokens (L, E) to bytes: bf16 little-endian, or int8 (L, E) followed by L float32 scales."""
    if dtype == "bf16":
        return embedding_LE.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    values = embedding_LE.to(torch.float32)
    scale_L1 = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127.0
    quantised = torch.round(values / scale_L1).clamp(-127, 127).to(torch.int8)
    return quantised.numpy().tobytes() + scale_L1[:, 0].numpy().astype("<f4").tobytes()


def unpack_embedding(value: bytes, width: int, dtype: str) -> Tensor:
    """Inverse of `pack_embedding`: bfloat16 of shape (L, E)."""
    if dtype == "bf16":
        return torch.frombuffer(bytearray(value), dtype=torch.bfloat16).reshape(-1, width)
    tokens = len(value) // (width + 4)
    quantised = np.frombuffer(value, dtype=np.int8, count=tokens * width).reshape(tokens, width)
    scale_L = np.frombuffer(value, dtype="<f4", offset=tokens * width)
    return torch.from_numpy(quantised.astype(np.float32) * scale_L[:, None]).to(torch.bfloat16)
