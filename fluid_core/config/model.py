"""`model`: the method. Every field left out is taken from the preset."""

from typing import Literal

from pydantic import Field, model_validator

from fluid_core.config.base import Section


class Preset(Section):
    """Geometry of one model size (paper appendix; facts on the head's depth: docs/model.md)."""

    blocks: int
    width: int
    heads: int
    aligner_blocks: int = 6
    head_blocks: int = 3
    paper_parameters: float | None = None


PRESETS: dict[str, Preset] = {
    "fluid-tiny": Preset(blocks=5, width=256, heads=4, aligner_blocks=2, head_blocks=3),
    "fluid-166m": Preset(blocks=12, width=768, heads=12, paper_parameters=166e6),
    "fluid-369m": Preset(blocks=16, width=1024, heads=16, paper_parameters=369e6),
    "fluid-665m": Preset(blocks=20, width=1280, heads=16, paper_parameters=665e6),
    "fluid-1.1b": Preset(blocks=24, width=1536, heads=16, paper_parameters=1.1e9),
    "fluid-3.1b": Preset(blocks=32, width=2304, heads=24, paper_parameters=3.1e9),
    "fluid-10.5b": Preset(blocks=34, width=4096, heads=64, paper_parameters=10.5e9),
}


class ModelConfig(Section):
    preset: str = "fluid-369m"
    blocks: int = Field(0, ge=0, description="0: from the preset; so for width, heads, aligner_blocks, head_blocks")
    width: int = Field(0, ge=0)
    heads: int = Field(0, ge=0)
    aligner_blocks: int = Field(-1, ge=-1, description="-1: from the preset")
    head_blocks: int = Field(0, ge=0)
    head_width: int = Field(0, ge=0, description="0: the trunk's width")

    tokens: Literal["continuous", "discrete"] = "continuous"
    order: Literal["random", "raster"] = "random"
    grid: int = Field(16, gt=0, description="tokens a side at the training size")
    patch: int = Field(2, gt=0, description="latents a side grouped into one token")
    latent_channels: int = Field(4, gt=0)
    codebook_size: int = Field(8192, gt=0, description="tokens: discrete")

    text_width: int = Field(4096, gt=0, description="width of the text encoder's states")
    max_text_tokens: int = Field(128, gt=0)
    caption_dropout: float = Field(0.1, ge=0, le=1)

    objective: Literal["eps", "v", "flow"] = "eps"
    timesteps_per_token: int = Field(4, gt=0)
    masked_tokens_per_image: int | None = Field(None, gt=0, description="fixed number given to the head: static shapes")
    mask_law: Literal["cosine", "truncnorm"] = "cosine"
    head_precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: where the trunk computes in it (not for eps)")

    @property
    def token_channels(self) -> int:
        """Channels of one continuous token: patch x patch latents of `latent_channels`, (c, p, q) c-major."""
        return self.latent_channels * self.patch * self.patch

    @property
    def num_tokens(self) -> int:
        return self.grid * self.grid

    @model_validator(mode="after")
    def _fill_from_preset(self) -> "ModelConfig":
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; one of {', '.join(PRESETS)}")
        preset = PRESETS[self.preset]
        values = self.__dict__
        values["blocks"] = self.blocks or preset.blocks
        values["width"] = self.width or preset.width
        values["heads"] = self.heads or preset.heads
        values["aligner_blocks"] = preset.aligner_blocks if self.aligner_blocks < 0 else self.aligner_blocks
        values["head_blocks"] = self.head_blocks or preset.head_blocks
        values["head_width"] = self.head_width or self.width
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.masked_tokens_per_image is not None and self.masked_tokens_per_image > self.num_tokens:
            raise ValueError(
                f"masked_tokens_per_image {self.masked_tokens_per_image} is more than the {self.num_tokens} tokens of an image"
            )
        if self.order == "raster" and self.mask_law != "cosine":
            raise ValueError(f"mask_law {self.mask_law} is of order: random; raster masks nothing")
        if self.objective == "eps" and self.head_precision == "bf16":
            raise ValueError("the eps head amplifies rounding errors: use head_precision: fp32, or objective: flow or v")
        return self
