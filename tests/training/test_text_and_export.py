"""The frozen encoders around a run: T5 in the worker instead of stored states, and a checkpoint back as a pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import run_workers, small_recipe, write_encoders

from fluid_core.cli import main
from fluid_core.config import Recipe
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.planning import text_encoder_bytes
from fluid_core.training.metrics import read_metrics
from fluid_core.training.sampling import _row

# The order of samples comes from the manifest's hash, in which the two data sets differ.
_SAME_ORDER = """
from fluid_core.latents.manifest import Manifest
Manifest.hash = property(lambda self: "same")
"""


def test_token_ids_and_stored_embeddings_train_alike(tmp_path: Path) -> None:
    encoder = write_encoders(tmp_path)
    lines, validation = {}, {}
    for mode in ("embeddings", "tokens"):
        recipe = small_recipe(tmp_path / mode, {"text_mode": mode, "text_encoder": encoder}, max_steps=3)
        recipe.text_encoder = recipe.text_encoder.model_copy(update={"path": str(tmp_path / "t5")})
        run_workers(recipe, _SAME_ORDER)
        lines[mode] = read_metrics(recipe.training_dir / "metrics.jsonl")
        validation[mode] = read_metrics(recipe.training_dir / "validation.jsonl")
    assert len(lines["tokens"]) == 3
    for ours, theirs in zip(lines["tokens"], lines["embeddings"], strict=True):
        assert ours["keys_sha256"] == theirs["keys_sha256"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert validation["tokens"][-1]["validation_loss"] == pytest.approx(
        validation["embeddings"][-1]["validation_loss"], abs=1e-5
    )


def test_the_planner_counts_the_text_encoder_of_the_worker(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = write_encoders(tmp_path)
    recipe = small_recipe(tmp_path)
    assert text_encoder_bytes(recipe, 6) == (0, 0)
    recipe.encode.text.mode = "tokens"
    weights, working = text_encoder_bytes(recipe, 6)
    assert weights == 2 * sum(p.numel() for p in encoder.model.parameters())
    assert text_encoder_bytes(recipe, 12) == (weights, 2 * working)

    def gib(config: Path, *arguments: str) -> dict[str, float]:
        with pytest.raises(SystemExit) as end:
            main(["plan", "--config", str(config), "--gpus", "64", "--json", *arguments])
        assert end.value.code == 0
        memory: dict[str, float] = json.loads(capsys.readouterr().out)["memory_per_gpu_gib"]
        return memory

    config = repository / "configs" / "fluid-10b.yaml"
    tokens, embeddings = gib(config), gib(config, "--set", "encode.text.mode=embeddings")
    # T5-XXL's encoder has 4.76B parameters.
    assert 8.8 < tokens["text_encoder"] < 10.5 and "text_encoder" not in embeddings
    assert tokens["total"] - embeddings["total"] == pytest.approx(tokens["text_encoder"], abs=0.01)


def test_an_exported_checkpoint_gives_the_trainers_own_samples(tmp_path: Path) -> None:
    write_encoders(tmp_path)
    recipe: Recipe = small_recipe(
        tmp_path, max_steps=2, learning_rate=0.05, warmup_steps=0, sample_prompts=["a red circle", "two blue square"]
    )
    recipe.generation = recipe.generation.model_copy(update={"num_steps": 4, "head_steps": 3, "solver": "heun"})
    run_workers(recipe)
    for weights in ("ema", "master"):
        with pytest.raises(SystemExit) as end:
            main(["export", str(recipe.training_dir), str(tmp_path / weights), "--weights", weights])
        assert end.value.code == 0
    grids = {name: np.asarray(Image.open(recipe.training_dir / "samples" / f"{name}_00000002.png")) for name in ("ema", "raw")}
    assert not np.array_equal(grids["ema"], grids["raw"])
    for weights, name in (("ema", "ema"), ("master", "raw")):
        pipeline = FluidPipeline.from_pretrained(tmp_path / weights)
        images = pipeline(recipe.training.sample_prompts, seed=recipe.seed)
        assert np.array_equal(np.asarray(_row(images)), grids[name])
