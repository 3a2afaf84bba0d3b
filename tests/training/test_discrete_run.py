"""The discrete raster variant from shards to pictures: VQ codes, a causal trunk under ZeRO-3, an exported bundle."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding_support import encode_here, image_bytes, make_shards, recipe_values
from PIL import Image
from small_run import run_workers
from tiny_fluid import TEXT_TOKENS, tiny_config, tiny_pipeline

from fluid_core.cli import main
from fluid_core.config import Recipe
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.latents.reader import EncodedDataset
from fluid_core.training.metrics import read_metrics
from fluid_core.training.sampling import _row


def test_a_discrete_raster_model_from_shards_to_pictures(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path, tokens="discrete").image_tokenizer.save_pretrained(tmp_path / "vq")
    make_shards(tmp_path / "train", 2, 12)
    make_shards(tmp_path / "validation", 1, 8, first=100)
    recipe = Recipe.model_validate(
        recipe_values(
            tmp_path, [str(tmp_path / "train")], tmp_path / "out",
            data={"image_size": 32, "validation_sources": [str(tmp_path / "validation")]},
            image_tokenizer={"path": str(tmp_path / "vq"), "kind": "vq"},
            text_encoder={"path": str(tmp_path / "t5"), "max_tokens": TEXT_TOKENS},
            encode={"validation_output": str(tmp_path / "out-validation")},
            model=tiny_config(tokens="discrete", order="raster").model_dump(exclude_none=True),
            training={
                "max_steps": 4, "batch_size": 8, "workers": 2, "precision": "fp32", "learning_rate": 0.02, "warmup_steps": 0,
                "ema_decay": 0.5, "validation_samples": 8, "sample_prompts": ["a red apple", "three circle on the left"],
            },
            generation={"num_steps": 16},
        )
    )  # fmt: skip

    manifest = encode_here(recipe)[0]
    assert (manifest.kind, manifest.latent_shape, manifest.counts["out"]) == ("vq", [4, 4], 24)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "vq", "vq")
    rows = EncodedDataset(str(tmp_path / "out")).read_group(0, 0)
    pictures = [Image.open(io.BytesIO(image_bytes(int(key)))).resize((32, 32), Image.Resampling.BOX) for key in rows.keys]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    assert rows.moments is None and rows.codes is not None and rows.codes.unique().numel() >= 3
    assert (rows.codes == tokenizer.encode(pixels)).float().mean() > 0.9  # resized in another way

    prompts = recipe.training.sample_prompts
    recipe.training.sample_prompts = ["a red apple on the left of a blue square on three green circle"]
    assert "prompt longer than 12 tokens" in run_workers(recipe, ok=False)
    assert not read_metrics(recipe.training_dir / "metrics.jsonl")

    recipe.training.sample_prompts = prompts
    run_workers(recipe)
    losses = [line["loss"] for line in read_metrics(recipe.training_dir / "metrics.jsonl")]
    assert losses[0] == pytest.approx(np.log(24), abs=0.3) and losses[-1] < losses[0]

    with pytest.raises(SystemExit) as end:
        main(["export", str(recipe.training_dir), str(tmp_path / "bundle")])
    assert end.value.code == 0
    images = FluidPipeline.from_pretrained(tmp_path / "bundle")(prompts, seed=recipe.seed)
    trainers = Image.open(recipe.training_dir / "samples" / "ema_00000004.png")
    assert np.array_equal(np.asarray(_row(images)), np.asarray(trainers))
