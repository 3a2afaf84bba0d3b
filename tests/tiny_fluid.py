"""Tiny models and pipelines with random weights, for every room's tests. No training: only shapes and exactness matter."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from fluid_core.config import GenerationConfig, ModelConfig, StandInT5Config
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.stand_in import create_stand_in_t5
from fluid_core.encoders.text import TextEncoder
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.model.fluid import FluidModel

TEXT_WIDTH, TEXT_TOKENS = 16, 12


def tiny_config(**settings: Any) -> ModelConfig:
    """A 4x4 grid, two blocks of width 32."""
    values = {
        "preset": "fluid-tiny", "grid": 4, "width": 32, "heads": 2, "blocks": 2, "aligner_blocks": 1, "head_blocks": 2,
        "text_width": TEXT_WIDTH, "max_text_tokens": TEXT_TOKENS, "codebook_size": 24, "objective": "flow",
    }  # fmt: skip
    return ModelConfig(**{**values, **settings})


def tiny_model(seed: int = 0, open_zeros: bool = True, **settings: Any) -> FluidModel:
    """`open_zeros` gives the layers that start at zero random weights, so that outputs depend on everything."""
    torch.manual_seed(seed)
    model = FluidModel(tiny_config(**settings))
    if open_zeros:
        open_zero_layers(model)
    return model.eval()


def open_zero_layers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("head.") and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.05)


def texts(count: int, seed: int = 0, longest: int = TEXT_TOKENS) -> list[Tensor]:
    """Random text states of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [torch.randn(length, TEXT_WIDTH, generator=generator) for length in lengths]


def padded(states: list[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """(text_BLE, text_mask_BL)."""
    longest = length or max(len(state) for state in states)
    text = torch.zeros(len(states), longest, TEXT_WIDTH)
    mask = torch.zeros(len(states), longest, dtype=torch.bool)
    for i, state in enumerate(states):
        text[i, : len(state)], mask[i, : len(state)] = state, True
    return text, mask


def tiny_pipeline(folder: Path, seed: int = 0, generation: GenerationConfig | None = None, **settings: Any) -> FluidPipeline:
    """A pipeline of random weights with real encoders: 32 px images, stride 4 and patch 2, so 8 pixels a token."""
    torch.manual_seed(seed)
    config = tiny_config(**settings)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    common: dict[str, Any] = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 4,
        **blocks,
    }
    if config.tokens == "continuous":
        image = ImageTokenizer(AutoencoderKL(in_channels=48, out_channels=48, **common), "kl")
        stats: tuple[Any, Any] = ([0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 1.5, 2.0])
    else:
        image = ImageTokenizer(VQModel(in_channels=192, out_channels=192, num_vq_embeddings=24, **common), "vq")
        stats = (None, None)
    words = Counter(["a", "red", "blue", "green", "circle", "square", "two", "three", "apple", "on", "the", "left", "of"])
    create_stand_in_t5(words, StandInT5Config(width=TEXT_WIDTH, layers=1, heads=2, vocabulary=128), folder / "t5", seed)
    text = TextEncoder.from_pretrained(folder / "t5", max_tokens=TEXT_TOKENS, dtype="fp32")
    solver = "heun" if config.objective == "flow" else "ddim"
    defaults = {"num_steps": 6, "head_steps": 4, "guidance_scale": 2.0, "guidance_schedule": "linear", "solver": solver}
    return FluidPipeline(
        tiny_model(seed, **settings), image, text, generation or GenerationConfig(**{**defaults, "temperature": 1.0}), *stats
    )
