"""Tokens: VAE latents grouped patch x patch (paper section 3: 32x32x4 latents give 16x16 tokens of 16 channels).

Shapes: B batch, C latent channels, H W latent height and width, N tokens (row-major), K = C * patch^2 token channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def patchify(latents_BCHW: Tensor, patch: int) -> Tensor:
    """Latents (B, C, H, W) to tokens (B, N, C * patch^2); channels are (c, p, q), c-major.

    Raises:
        ValueError: when the shape is not 4-D or a side is not a multiple of `patch`, which is at least 1.
    """
    if latents_BCHW.ndim != 4:
        raise ValueError(f"latents must be (batch, channels, height, width), got shape {tuple(latents_BCHW.shape)}")
    B, C, H, W = latents_BCHW.shape
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"latent size {H}x{W} is not a multiple of patch {patch}")
    grouped = latents_BCHW.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return grouped.reshape(B, (H // patch) * (W // patch), C * patch * patch)


def unpatchify(tokens_BNK: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: tokens (B, h * w, C * patch^2) to latents (B, C, h * patch, w * patch)."""
    h, w = grid
    if tokens_BNK.ndim != 3:
        raise ValueError(f"tokens must be (batch, tokens, channels), got shape {tuple(tokens_BNK.shape)}")
    B, N, K = tokens_BNK.shape
    if patch < 1 or h * w != N or K % (patch * patch):
        raise ValueError(f"tokens of shape {tuple(tokens_BNK.shape)} do not fill a {h}x{w} grid with patch {patch}")
    C = K // (patch * patch)
    grouped = tokens_BNK.reshape(B, h, w, C, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grouped.reshape(B, C, h * patch, w * patch)


def _per_channel(values: Tensor | list[float], like_BCHW: Tensor, name: str) -> Tensor:
    values_C = torch.as_tensor(values, dtype=like_BCHW.dtype, device=like_BCHW.device)
    if values_C.shape != (like_BCHW.shape[1],):
        raise ValueError(
            f"{name} has shape {tuple(values_C.shape)}, wanted one value for each of {like_BCHW.shape[1]} channels"
        )
    return values_C[None, :, None, None]


def normalise(latents_BCHW: Tensor, mean_C: Tensor | list[float], std_C: Tensor | list[float]) -> Tensor:
    """Zero mean and unit deviation for each latent channel, with statistics measured on the training set."""
    return (latents_BCHW - _per_channel(mean_C, latents_BCHW, "mean")) / _per_channel(std_C, latents_BCHW, "std")


def denormalise(latents_BCHW: Tensor, mean_C: Tensor | list[float], std_C: Tensor | list[float]) -> Tensor:
    """The inverse of `normalise`."""
    return latents_BCHW * _per_channel(std_C, latents_BCHW, "std") + _per_channel(mean_C, latents_BCHW, "mean")


def check_finite(keys: Sequence[str], tokens: Tensor, text_BLE: Tensor) -> None:
    """Raise ValueError with the keys of the samples whose tokens or text states hold NaN or infinite values.

    One wrong sample would turn every weight into NaN. `tokens`: (B, N, C), or codes (B, N), which are always finite.
    """
    for name, values in (("latents", tokens), ("text embeddings", text_BLE)):
        if not values.is_floating_point() or bool(torch.isfinite(values.sum())):
            continue  # one pass over memory; NaN and infinity would be in the sum
        broken = (~torch.isfinite(values).flatten(1).all(dim=1)).nonzero()[:, 0].tolist()
        if broken:
            shown = ", ".join(repr(keys[b]) for b in broken[:5])
            raise ValueError(f"NaN or infinite {name} in {len(broken)} sample(s): {shown}; encode their shards again")
