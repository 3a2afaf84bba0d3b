"""How well a tokenizer rebuilds images it was not trained on: the ceiling of every picture the model can make."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.pixels import PixelSet, to_float

BATCH = 64


def psnr(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,); both (B, 3, S, S) in [-1, 1]."""
    error = ((images.float() - rebuilt.float()) / 2.0).square().flatten(1).mean(dim=1)
    return -10.0 * torch.log10(error.clamp_min(1e-10))


@torch.no_grad()
def rebuild(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Encode (posterior mean or codes) and decode uint8 images (B, 3, S, S); returns float (B, 3, S, S) in [-1, 1]."""
    latents = tokenizer.encode(to_float(images))
    return tokenizer.decode(latents if tokenizer.kind == "vq" else latents.chunk(2, dim=1)[0]).cpu()


def reconstruction_psnr(tokenizer: ImageTokenizer, images: Tensor) -> float:
    """Mean over the images of each one's PSNR in dB; images uint8 (n, 3, S, S)."""
    parts = [psnr(to_float(batch), rebuild(tokenizer, batch)) for batch in images.split(BATCH)]
    return float(torch.cat(parts).mean())


def reconstruction_grid(tokenizer: ImageTokenizer, sets: list[PixelSet], columns: int = 12) -> Image.Image:
    """For each data set a row of originals above a row of what came back."""
    rows = []
    for pixels in sets:
        step = max(1, len(pixels.images) // columns)
        originals = pixels.images[::step][:columns]
        rebuilt = ((rebuild(tokenizer, originals) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        blank = columns - len(originals)
        for images in (originals, rebuilt):
            tiles = torch.cat((images, torch.full((blank, *images.shape[1:]), 255, dtype=torch.uint8)))
            rows.append(np.concatenate(list(tiles.permute(0, 2, 3, 1).numpy()), axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))
