"""Recipes: one YAML file describes one run, from the images to the server.

    recipe = load_recipe("configs/demo.yaml", ["training.max_steps=100"])

Unknown keys, wrong types and impossible combinations are errors before any work starts.
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from fluid_core.config.base import Section
from fluid_core.config.data import DataConfig, FilterConfig, MetadataThreshold, OpenMojiConfig, ShapesConfig
from fluid_core.config.deploy import SOLVERS, EvaluationConfig, GenerationConfig, RegistryConfig, ServingConfig
from fluid_core.config.encode import EncodeConfig, TextStorageConfig
from fluid_core.config.encoders import ImageTokenizerConfig, StandInT5Config, TextEncoderConfig, TokenizerTrainingConfig
from fluid_core.config.model import PRESETS, ModelConfig, Preset
from fluid_core.config.training import MixtureItem, TrainingConfig

__all__ = [
    "PRESETS", "DataConfig", "EncodeConfig", "EvaluationConfig", "FilterConfig", "GenerationConfig", "ImageTokenizerConfig",
    "MetadataThreshold", "MixtureItem", "ModelConfig", "OpenMojiConfig", "Preset", "Recipe", "RegistryConfig", "Section",
    "ServingConfig", "ShapesConfig", "StandInT5Config", "TextEncoderConfig", "TextStorageConfig", "TokenizerTrainingConfig",
    "TrainingConfig", "config_hash", "load_recipe",
]  # fmt: skip


class Recipe(Section):
    """Everything about one run. `<runs_dir>/<name>` holds what it writes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    seed: int = Field(0, ge=0)
    data: DataConfig
    image_tokenizer: ImageTokenizerConfig
    text_encoder: TextEncoderConfig
    encode: EncodeConfig
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    serving: ServingConfig = ServingConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def training_dir(self) -> Path:
        return Path(self.runs_dir) / (self.training.run_name or self.name)

    @property
    def mixture(self) -> list[MixtureItem]:
        """What training reads: `training.datasets`, or all of `encode.output`."""
        return self.training.datasets or [MixtureItem(path=self.encode.output)]

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        per_step = self.training.workers * (self.training.micro_batch_size or 1)
        if self.training.batch_size % per_step:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} is not a multiple of workers x micro_batch_size = {per_step}"
            )
        if (self.model.tokens == "discrete") != (self.image_tokenizer.kind == "vq"):
            raise ValueError(
                f"model.tokens {self.model.tokens!r} does not go with image_tokenizer.kind {self.image_tokenizer.kind!r}: "
                "use kl with continuous, vq with discrete"
            )
        solvers = SOLVERS[self.model.objective]
        if self.model.tokens == "continuous" and self.generation.solver not in solvers:
            raise ValueError(
                f"generation.solver {self.generation.solver!r} does not go with model.objective {self.model.objective!r}: "
                f"use one of {', '.join(solvers)}"
            )
        train = self.image_tokenizer.train
        if self.model.tokens == "discrete" and train is not None and train.codebook_size != self.model.codebook_size:
            raise ValueError(
                f"model.codebook_size {self.model.codebook_size} is not image_tokenizer.train.codebook_size {train.codebook_size}"
            )
        return self


def config_hash(*sections: Any) -> str:
    """sha256 (hex, 16 characters) of the canonical JSON of pydantic models or plain values."""
    plain = [section.model_dump(mode="json") if isinstance(section, Section) else section for section in sections]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides (values are parsed as YAML).

    Raises:
        ValueError: with one line a problem, each naming the key and what to do.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"recipe {path} does not exist{hint}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of sections")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override!r}: write section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {override!r}: {text!r} is not valid YAML") from None
        _assign(values, key.strip().split("."), value, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "recipe"
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
        raise ValueError(f"{path}: " + "; ".join(lines)) from None


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"--set {override!r}: {key!r} is not a section")
    values[keys[-1]] = value
