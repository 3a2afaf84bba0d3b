"""`training`: the optimiser, the schedule, ZeRO, checkpoints."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fluid_core.config.base import Section


class MixtureItem(Section):
    path: str = Field(description="an encoded data set")
    source: str | None = Field(None, description="only the shards that came from this entry of data.sources (a glob)")
    weight: float = Field(1.0, gt=0)
    from_step: int = Field(0, ge=0, description="joins the mixture at about this step: a curriculum")


class TrainingConfig(Section):
    run_name: str | None = Field(None, description="default: the recipe's name; output goes to <runs_dir>/<run_name>")
    datasets: list[MixtureItem] = Field([], description="default: encode.output")
    max_steps: int = Field(1_000_000, gt=0)
    batch_size: int = Field(2048, gt=0, description="global, in images")
    micro_batch_size: int | None = Field(None, gt=0, description="per worker; default: batch_size / workers")
    workers: int = Field(2, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile of each block: for GPUs, with zero_stage 0, 1 or 2")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the device computes it, else fp32")

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    muon_learning_rate: float = Field(3e-3, gt=0, description="optimizer: muon, hidden matrices")
    muon_iterations: int = Field(4, gt=0, description="Newton-Schulz iterations")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.02, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    schedule: Literal["constant", "cosine", "linear_decay"] = "constant"
    warmup_steps: int = Field(65_000, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1, description="schedule: linear_decay, share of the steps that decay")
    ema_decay: float = Field(0.9999, ge=0, lt=1)

    loader: Literal["parquet", "ray_data"] = Field(
        "parquet", description="ray_data: streamed by Ray Data; a resume is exact at the same number of workers only"
    )
    shuffle_window: int = Field(65_536, gt=0, description="rows shuffled together")
    checkpoint_every: int = Field(2000, gt=0)
    keep_last: int = Field(3, gt=0)
    keep_every: int | None = Field(None, gt=0)
    checkpoint_path: str | None = Field(
        None, description="folder, or a s3:// prefix of this run; default: under the run's folder"
    )
    log_every: int = Field(10, gt=0)
    validate_every: int = Field(1000, gt=0)
    validation_samples: int = Field(256, gt=0)
    sample_every: int = Field(1000, gt=0)
    sample_prompts: list[str] = []
    max_failures: int = Field(3, ge=-1, description="worker restarts before the run is given up; -1: never give up")
    spike_factor: float = Field(10.0, gt=1, description="a gradient norm this many times its running mean is a strike")
    max_strikes: int = Field(3, gt=0, description="steps skipped in a row before rolling back and skipping the window")
    watchdog_seconds: float = Field(
        900.0,
        gt=0,
        description="a step, a validation, or a checkpoint's reading or writing that takes longer is taken for a hang",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2: stage 3 fetches weights inside the blocks")
        return self

    def micro_batch(self, workers: int) -> int:
        """Images a worker computes at a time."""
        return self.micro_batch_size or max(1, self.batch_size // workers)

    @property
    def checkpoint_uri(self) -> str | None:
        """The s3:// prefix that checkpoints are copied to, if any."""
        return self.checkpoint_path if self.checkpoint_path and "://" in self.checkpoint_path else None

    def checkpoint_folder(self, run_dir: str | Path) -> Path:
        """The folder that checkpoints are saved in, of a run whose output goes to `run_dir`."""
        return Path(self.checkpoint_path) if self.checkpoint_path and not self.checkpoint_uri else Path(run_dir) / "checkpoints"
