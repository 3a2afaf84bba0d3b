"""The small tokenizer that `train_tokenizer` trains, and its loss.

Legend: B batch, S side of the image, H W latent height and width, C latent channels, K codes.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.nn import functional as F

from fluid_core.config import ImageTokenizerConfig, TokenizerTrainingConfig
from fluid_core.encoders.image import LOGVAR_RANGE, DiffusersModel


def build_tokenizer(config: ImageTokenizerConfig, image_size: int) -> DiffusersModel:
    """An untrained tokenizer with the geometry of `config.train`.

    Raises:
        ValueError: the image size is not a multiple of the stride, or the channels do not fit the normalisation.
    """
    train = config.train
    assert train is not None
    levels = len(train.block_out_channels)
    stride = train.pixel_unshuffle * 2 ** (levels - 1)
    if image_size % stride:
        raise ValueError(
            f"data.image_size {image_size} is not a multiple of the tokenizer's stride {stride} "
            f"(pixel_unshuffle {train.pixel_unshuffle} and {levels - 1} halvings)"
        )
    groups = 16
    if any(channels % groups for channels in train.block_out_channels):
        raise ValueError(f"image_tokenizer.train.block_out_channels {train.block_out_channels}: use multiples of {groups}")
    channels = 3 * train.pixel_unshuffle**2
    geometry: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(train.block_out_channels),
        "layers_per_block": 1,
        "latent_channels": train.latent_channels,
        "sample_size": image_size // train.pixel_unshuffle,
        "norm_num_groups": groups,
        "mid_block_add_attention": False,
    }
    if config.kind == "kl":
        return AutoencoderKL(**geometry, force_upcast=False)
    return VQModel(**geometry, num_vq_embeddings=train.codebook_size)


def reconstruction_loss(reconstructed: Tensor, images: Tensor, gradient_weight: float) -> Tensor:
    """L1 + MSE + weight * L1 of the horizontal and vertical differences, fp32 scalar; images (B, 3, S, S) in [-1, 1].

    The differences weigh edges: in drawings they carry what the eye sees, and plain pixel losses leave them soft.
    """
    error = reconstructed.float() - images
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return error.abs().mean() + error.square().mean() + gradient_weight * edges


class Autoencoder(nn.Module):
    """A tokenizer with its loss as one module, so that DDP sees a single forward."""

    def __init__(self, model: DiffusersModel, train: TokenizerTrainingConfig):
        super().__init__()
        self.model = model
        self.is_vq = isinstance(model, VQModel)
        self.train_config = train

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Images (B, 3, S, S) in [-1, 1] and noise (B, C, H, W) -> (loss, its parts, for vq the encoder's outputs (n, C))."""
        config, model = self.train_config, self.model
        folded = F.pixel_unshuffle(images, config.pixel_unshuffle)
        hidden: Tensor | None = None
        if self.is_vq:
            latents = model.encode(folded).latents.float()
            quantised, commitment, _ = model.quantize(latents)
            hidden = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            # `decode` would quantise a second time: its decoder is called as ImageTokenizer.decode calls it.
            decoded = model.decoder(model.post_quant_conv(quantised))
            penalty = {"commitment": commitment.float()}
            extra = commitment.float()
        else:
            mean, logvar = model.encode(folded).latent_dist.parameters.float().chunk(2, dim=1)
            logvar = logvar.clamp(*LOGVAR_RANGE)
            decoded = model.decode(mean + (0.5 * logvar).exp() * noise).sample
            divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)).mean()
            penalty = {"kl": divergence}
            extra = config.kl_weight * divergence
        reconstructed = F.pixel_shuffle(decoded, config.pixel_unshuffle)
        rebuilt = reconstruction_loss(reconstructed, images, config.gradient_weight)
        return rebuilt + extra, {"reconstruction": rebuilt.detach(), **{k: v.detach() for k, v in penalty.items()}}, hidden


class Codebook:
    """Keeps the codes of a VQ tokenizer in use: codes that no image chose for a while move onto encoder outputs.

    The decision is a function of the global counts and of rank 0's batch, so every rank holds the same codebook.
    """

    EVERY = 50

    def __init__(self, model: DiffusersModel):
        self.weight = model.quantize.embedding.weight
        self.used = torch.zeros(len(self.weight))

    def count(self, hidden: Tensor) -> None:
        """Note which codes the encoder outputs (n, C) are nearest to."""
        codes = torch.cdist(hidden, self.weight.detach()).argmin(dim=1)
        self.used += torch.bincount(codes.cpu(), minlength=len(self.used))

    def gather(self) -> None:
        """Sum the counts of all ranks into rank 0's, so that its checkpoint holds them all. Call on every rank."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = self.weight.device
            total = self.used.to(device)
            torch.distributed.all_reduce(total)
            self.used = total.cpu() if torch.distributed.get_rank() == 0 else torch.zeros_like(self.used)

    @torch.no_grad()
    def revive(self, hidden: Tensor, step: int) -> int:
        """Move the unused codes onto randomly chosen encoder outputs; returns how many. Call on every rank."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        used = self.used.to(self.weight.device)
        if distributed:
            torch.distributed.all_reduce(used)
        dead = (used == 0).nonzero().flatten()
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(hidden), (len(dead),), generator=generator).to(hidden.device)
        vectors = hidden[pick].clone()
        if distributed:
            torch.distributed.broadcast(vectors, src=0)
        self.weight[dead] = vectors
        self.used.zero_()
        return len(dead)
