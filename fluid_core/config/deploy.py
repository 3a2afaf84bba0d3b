"""`evaluation`, `registry` and `serving`: what happens to a trained model."""

from typing import Literal

from pydantic import Field, model_validator

from fluid_core.config.base import Section

SOLVERS = {"eps": ("ddpm", "ddim", "dpm2"), "v": ("ddpm", "ddim", "dpm2"), "flow": ("heun", "euler")}
"""Of the diffusion head, by the model's objective."""


class GenerationConfig(Section):
    """Defaults of FluidPipeline for this recipe's model; they travel in the bundle."""

    num_steps: int = Field(64, gt=0)
    head_steps: int = Field(100, gt=0)
    guidance_scale: float = Field(5.0, ge=0)
    guidance_schedule: Literal["constant", "linear"] = "linear"
    temperature: float = Field(0.975, gt=0)
    solver: Literal["ddpm", "ddim", "dpm2", "euler", "heun"] = "ddpm"


class EvaluationConfig(Section):
    output: str | None = Field(None, description="default: <runs_dir>/<name>/evaluation")
    shapes_prompts_per_category: int = Field(64, gt=0)
    openmoji_prompts: int = Field(200, gt=0)
    batch_size: int = Field(64, gt=0)
    seed: int = 0


class RegistryConfig(Section):
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    experiment: str = "fluid"
    model_name: str = "fluid"
    bundles: str | None = Field(None, description="where bundles are kept, local or s3://; default: <runs_dir>/<name>/bundles")
    max_validation_loss_increase: float = Field(0.05, ge=0, description="gate: relative to the champion's")
    minimum_metrics: dict[str, float] = Field({}, description="gate: evaluation metrics that must be reached")
    licence: str = "Apache-2.0"
    attribution: str = ""


class ServingConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    model: str | None = Field(None, description="bundle folder or models:/name@alias; default: the registry's champion")
    storage: str | None = Field(None, description="files and batches, local or s3://; default: <runs_dir>/<name>/serving")
    follow_alias_seconds: float = Field(15.0, gt=0, description="how often a moved alias is looked for")

    replicas: int = Field(1, gt=0)
    cpus_per_replica: float = Field(1.0, ge=0)
    gpus_per_replica: float = Field(0.0, ge=0)
    max_batch_size: int = Field(32, gt=0, description="images decoded together in one replica")
    max_queued: int = Field(256, gt=0, description="images that wait or run; beyond it clients get 429")
    deadline_seconds: float = Field(300.0, gt=0, description="a request that takes longer gets 504")
    drain_seconds: float = Field(330.0, gt=0, description="time that a replica has to finish its requests")

    api_keys_file: str | None = Field(None, description="lines `name:sha256`; made with pipelines/serve.py --new-key NAME")
    requests_per_minute: int | None = Field(None, gt=0, description="for each API key, or client address without keys")
    max_prompt_chars: int = Field(4000, gt=0)
    max_steps: int = Field(1024, gt=0)
    max_image_side: int = Field(2048, gt=0, description="pixels, of uploads and of sizes asked for")
    max_upload_bytes: int = Field(20_000_000, gt=0, description="of the body of an image edit")
    max_file_bytes: int = Field(200_000_000, gt=0, description="of a batch file")
    blocked_words_file: str | None = Field(None, description="one word or phrase a line; default: a short built-in list")
    safety_hook: str | None = Field(None, description="package.module:factory of a SafetyHook; default: the block list")

    cost_per_replica_hour: float | None = Field(None, ge=0, description="for the cost estimate of batches")

    @model_validator(mode="after")
    def _check(self) -> "ServingConfig":
        if self.max_queued < self.max_batch_size:
            raise ValueError(
                f"max_queued {self.max_queued} is below max_batch_size {self.max_batch_size}: batches could not fill"
            )
        if self.drain_seconds < self.deadline_seconds:
            raise ValueError(
                f"drain_seconds {self.drain_seconds} is below deadline_seconds {self.deadline_seconds}: a redeploy would cut requests off"
            )
        if self.safety_hook and self.blocked_words_file:
            raise ValueError(
                "blocked_words_file belongs to the default hook: it has no effect beside safety_hook; drop one of them"
            )
        return self
