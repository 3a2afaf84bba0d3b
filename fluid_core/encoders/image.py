"""Images to latents and back: any diffusers `AutoencoderKL` (continuous) or `VQModel` (codes), frozen (paper section 3.1).

Legend: B batch, H W latent height and width, C latent channels, S stride (pixels a side of one latent).

A tokenizer whose `in_channels` is 3*u*u is fed by `pixel_unshuffle(u)`: on CPU folding pixels into channels is several times
faster than a full-resolution stem. A stock Stable Diffusion VAE has u = 1.
"""

import functools
import math
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor
from torch.nn import functional as F

from fluid_core.encoders.source import load_pretrained, weights_sha256

Kind = Literal["kl", "vq"]
DiffusersModel = Any  # AutoencoderKL or VQModel: diffusers makes its classes in ways that type checkers cannot follow
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to the same


class ImageTokenizer:
    """A frozen image tokenizer. Latents are un-normalised: no scaling factor is applied in either direction."""

    def __init__(self, model: DiffusersModel, kind: Kind, identity: dict[str, Any] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.kind: Kind = kind
        config = model.config
        self.unshuffle = math.isqrt(config.in_channels // 3)
        if config.in_channels != 3 * self.unshuffle**2 or config.out_channels != config.in_channels:
            raise ValueError(
                f"image_tokenizer: in_channels {config.in_channels}, out_channels {config.out_channels}: both must be 3*u*u"
            )
        self.stride: int = self.unshuffle * 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels: int = config.latent_channels
        self._identity = identity or {"path": None, "kind": kind, "revision": None, "sha256": None}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, kind: Kind = "kl", revision: str | None = None, device: str | torch.device = "cpu"
    ) -> "ImageTokenizer":
        """Load a folder or hub id (`organisation/name[/subfolder]`) in fp32.

        Raises:
            ValueError: nothing there, weights missing, or a model of the other kind.
        """
        if kind not in ("kl", "vq"):
            raise ValueError(f"image_tokenizer.kind {kind!r}: use kl or vq")
        wanted = AutoencoderKL if kind == "kl" else VQModel
        load = functools.partial(
            wanted.from_pretrained, output_loading_info=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        declared = _declared_class(Path(path))
        if declared is not None and declared != wanted.__name__:
            raise ValueError(f"image_tokenizer: {path} holds a {declared}, but kind {kind!r} needs a {wanted.__name__}")
        model, folder, commit = load_pretrained(load, str(path), revision, "image_tokenizer")
        identity = {"path": str(path), "kind": kind, "revision": commit, "sha256": weights_sha256(folder)}
        return cls(model.to(device), kind, identity)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def codebook_size(self) -> int:
        """Number of codes; kind vq only."""
        if self.kind != "vq":
            raise ValueError("a kl tokenizer has no codebook")
        return self.model.config.num_vq_embeddings

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S*H, S*W), float in [-1, 1].

        Returns:
            kl: moments (B, 2C, H, W) fp32, mean then log-variance; vq: codes (B, H, W) int64.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"encode wants float images (B, 3, height, width), got {tuple(images.shape)} {images.dtype}")
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(f"image sides {tuple(images.shape[2:])} are not multiples of the tokenizer's stride {self.stride}")
        folded = F.pixel_unshuffle(images.to(self.device), self.unshuffle)
        if self.kind == "vq":
            hidden = self.model.encode(folded).latents
            indices = self.model.quantize(hidden.float())[2][2]
            return indices.reshape(hidden.shape[0], hidden.shape[2], hidden.shape[3])
        moments = self.model.encode(folded).latent_dist.parameters.float()
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat((mean, logvar.clamp(*LOGVAR_RANGE)), dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Un-normalised latents (B, C, H, W), or codes (B, H, W) for vq -> images (B, 3, S*H, S*W) in [-1, 1], fp32."""
        latents = latents.to(self.device)
        if self.kind == "vq":
            if latents.dim() != 3 or latents.is_floating_point():
                raise ValueError(f"decode wants integer codes (B, H, W), got {tuple(latents.shape)} {latents.dtype}")
            quantised = self.model.quantize.embedding(latents).permute(0, 3, 1, 2).contiguous()
            spatial = quantised if self.model.config.norm_type == "spatial" else None
            folded = self.model.decoder(self.model.post_quant_conv(quantised), spatial)
        else:
            if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
                raise ValueError(f"decode wants latents (B, {self.latent_channels}, H, W), got {tuple(latents.shape)}")
            folded = self.model.decode(latents.float()).sample
        return F.pixel_shuffle(folded.float(), self.unshuffle).clamp(-1.0, 1.0)

    def identity(self) -> dict[str, Any]:
        """{"path", "kind", "revision", "sha256"}: what a manifest records, and what a bundle is checked against."""
        return dict(self._identity)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a diffusers folder (config.json and safetensors)."""
        self.model.save_pretrained(str(path), safe_serialization=True)


def _declared_class(folder: Path) -> str | None:
    import json

    config = folder / "config.json"
    return json.loads(config.read_text()).get("_class_name") if config.is_file() else None
