"""`image_tokenizer` and `text_encoder`: the two frozen encoders."""

from typing import Literal

from pydantic import Field, model_validator

from fluid_core.config.base import Section


class TokenizerTrainingConfig(Section):
    """Training of a small tokenizer of our own; absent where the recipe names a pre-trained folder or hub id."""

    max_steps: int = Field(3000, gt=0)
    batch_size: int = Field(32, gt=0, description="global")
    workers: int = Field(2, gt=0)
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = Field(2e-3, gt=0)
    muon_learning_rate: float = Field(6e-3, gt=0, description="optimizer: muon, hidden convolutions")
    pixel_unshuffle: int = Field(4, gt=0, description="pixels folded into channels before the first convolution")
    block_out_channels: list[int] = Field([64, 128], description="channels of each level, each level halving the side")
    latent_channels: int = Field(4, gt=0)
    codebook_size: int = Field(512, gt=0, description="kind: vq only")
    kl_weight: float = Field(1e-6, ge=0)
    gradient_weight: float = Field(0.5, ge=0, description="weight of the image-gradient loss term")
    warmup_steps: int = Field(50, gt=0)
    ema_decay: float = Field(0.99, ge=0, lt=1)
    weights: dict[str, float] = Field(
        {}, description="share of each data set (metadata's `source`) in a batch; default: by number of images"
    )
    checkpoint_every: int = Field(500, gt=0)
    gpus_per_worker: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "TokenizerTrainingConfig":
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of workers {self.workers}")
        if not self.block_out_channels:
            raise ValueError("block_out_channels needs at least one level")
        return self


class ImageTokenizerConfig(Section):
    path: str = Field(description="folder or hub id of a diffusers AutoencoderKL or VQModel; where `train` writes")
    kind: Literal["kl", "vq"] = "kl"
    revision: str | None = None
    train: TokenizerTrainingConfig | None = None


class StandInT5Config(Section):
    """A small randomly initialised T5 encoder with a tokenizer trained on the captions: stands in for t5-v1_1-xxl."""

    width: int = Field(128, gt=0)
    layers: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    vocabulary: int = Field(4096, gt=0)


class TextEncoderConfig(Section):
    path: str = Field(description="folder or hub id of a T5, flan-T5 or ByT5 encoder")
    revision: str | None = None
    max_tokens: int = Field(128, gt=0)
    dtype: Literal["bf16", "fp32"] = "bf16"
    create: StandInT5Config | None = None
