import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import Program
from torch.nn import functional as F

from fluid_core.config import ImageTokenizerConfig, TokenizerTrainingConfig, load_recipe
from fluid_core.data.shapes import samples
from fluid_core.data.shard_writer import write_shards
from fluid_core.encoders.autoencoder import Autoencoder, Codebook, build_tokenizer, reconstruction_loss
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.encoders.pixels import PixelSet, collect_pixels, list_tars, open_pixels, to_float
from fluid_core.encoders.quality import psnr, reconstruction_psnr
from fluid_core.encoders.source import weights_sha256
from fluid_core.encoders.tokenizer_optimizer import TokenizerOptimizer
from fluid_core.encoders.tokenizer_run import train_tokenizer
from fluid_core.encoders.tokenizer_training import Mixture, learning_rate_factor
from fluid_core.entry import run_pipeline
from fluid_core.registry.mlflow_client import mlflow_client

PIPELINE = Path(__file__).resolve().parents[2] / "pipelines" / "train_tokenizer.py"
SMALL = {
    "block_out_channels": [16, 32],
    "batch_size": 8,
    "workers": 2,
    "max_steps": 12,
    "checkpoint_every": 4,
    "warmup_steps": 2,
}


def section(kind: str = "kl", **train: object) -> ImageTokenizerConfig:
    return ImageTokenizerConfig.model_validate({"path": "unused", "kind": kind, "train": {**SMALL, **train}})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for split, number in (("train", 24), ("validation", 6)):
        write_shards(samples(split, number, 32, 0), root / split, 12)
    return root


@pytest.fixture
def recipe_file(tmp_path, shards, tracking_uri):
    path = tmp_path / "recipe.yaml"
    values = {
        "name": "t",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"image_size": 32, "sources": [f"{shards}/train/*.tar"], "validation_sources": [f"{shards}/validation"]},
        "image_tokenizer": {"path": str(tmp_path / "tokenizer"), "train": SMALL},
        "text_encoder": {"path": "unused"},
        "encode": {"output": "unused"},
        "registry": {"tracking_uri": tracking_uri, "experiment": "tokenizer-test"},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def run(recipe_file: Path, *overrides: str) -> int:
    """The pipeline in this process: its exit code."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    spec = importlib.util.spec_from_file_location("train_tokenizer", PIPELINE)
    assert spec is not None and spec.loader is not None
    pipeline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipeline)
    with pytest.raises(SystemExit) as end:
        run_pipeline(pipeline.main, pipeline.__doc__, argv=["--config", str(recipe_file), *arguments])
    return int(end.value.code or 0)


@pytest.mark.timeout(1200)
def test_killed_and_resumed_equals_undisturbed(recipe_file, tmp_path, ray_session, capsys):
    """The pipeline, killed (kill -9) after its first checkpoint, ends with the bytes of one that was left alone."""
    quiet = load_recipe(recipe_file, [f"runs_dir={tmp_path}/quiet", f"image_tokenizer.path={tmp_path}/quiet/tokenizer"])
    undisturbed = train_tokenizer(quiet, "f")
    assert undisturbed["set_aside"] == 0
    assert undisturbed["metrics"]["psnr_shapes"] > 3.0
    lines = [json.loads(line) for line in (tmp_path / "quiet/t/tokenizer_training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [12]
    assert [line["step"] for line in lines if "psnr_shapes" in line] == [4, 8]

    # Long enough to be killed between a checkpoint and the end, and then finished at the step of the other run.
    checkpoint = tmp_path / "runs/t/tokenizer_training/last.pt"
    process = Program([str(PIPELINE), "--config", str(recipe_file)], tmp_path / "killed.log")
    deadline = time.monotonic() + 240
    while not checkpoint.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.is_file(), process.output()
    assert not (tmp_path / "tokenizer").exists(), "killed too late for this test to mean anything"

    assert run(recipe_file) == 0
    assert "psnr_shapes" in capsys.readouterr().out
    assert weights_sha256(tmp_path / "tokenizer") == weights_sha256(tmp_path / "quiet/tokenizer")
    record = json.loads((tmp_path / "runs/t/stages/train_tokenizer.json").read_text())
    assert record["metrics"]["psnr_shapes"] == pytest.approx(undisturbed["metrics"]["psnr_shapes"])
    assert Path(record["reconstructions"]).is_file()
    assert sorted(p.name for p in (tmp_path / "runs/t/tokenizer_training").iterdir()) == [
        "metrics.jsonl", "reconstructions.png", "result.json",
    ]  # fmt: skip
    assert run(recipe_file) == 0
    assert "already complete" in capsys.readouterr().out

    client = mlflow_client(quiet.registry.tracking_uri)
    experiment = client.get_experiment_by_name("tokenizer-test")
    runs = client.search_runs([experiment.experiment_id])
    assert any("psnr_shapes" in r.data.metrics and "tokenizer_loss" in r.data.metrics for r in runs)


def test_vq_trains_with_the_same_pipeline(recipe_file, tmp_path, ray_session):
    overrides = ["image_tokenizer.kind=vq", "image_tokenizer.train.codebook_size=32", "image_tokenizer.train.workers=1"]
    overrides.append("model.tokens=discrete")
    with pytest.raises(ValueError, match=r"model\.codebook_size 8192 is not image_tokenizer\.train\.codebook_size 32"):
        load_recipe(recipe_file, overrides)
    recipe = load_recipe(recipe_file, [*overrides, "model.codebook_size=32"])
    result = train_tokenizer(recipe, "f")
    assert set(result["metrics"]) == {"psnr_shapes", "codes_used", "perplexity"}
    assert result["metrics"]["codes_used"] > 0.2
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "tokenizer", "vq")
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4)


def test_nothing_to_train_with_a_pretrained_tokenizer(recipe_file, capsys):
    assert run(recipe_file, "image_tokenizer.train=null") == 0
    assert "nothing to train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources=['absent/*.tar']"], "no local tar matches absent"),
        (["data.image_size=36"], "not a multiple of the tokenizer's stride 8"),
        (["image_tokenizer.train.block_out_channels=[20]"], "use multiples of 16"),
        (["image_tokenizer.train.weights={photos: 1.0}"], "names 'photos'; the data sets are shapes"),
        (["image_tokenizer.train.batch_size=7"], "not a multiple of workers"),
        (["image_tokenizer.train.optimiser=adamw"], "did you mean 'optimizer'"),
    ],
)
def test_bad_recipes_give_one_line(recipe_file, overrides, message, capsys):
    assert run(recipe_file, *overrides) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in error


def test_more_workers_than_cpus_is_said(recipe_file, ray_session):
    recipe = load_recipe(recipe_file, ["image_tokenizer.train.workers=64", "image_tokenizer.train.batch_size=64"])
    with pytest.raises(ValueError, match="asks for 64 CPUs and Ray has 4"):
        train_tokenizer(recipe, "f")


def test_a_folder_of_somebody_else_is_not_replaced(recipe_file, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="was not trained here"):
        train_tokenizer(load_recipe(recipe_file), "f")


def test_batches_do_not_depend_on_the_number_of_workers():
    sets = [
        PixelSet(name, torch.arange(30).view(30, 1, 1, 1).repeat(1, 3, 2, 2) + base) for name, base in (("a", 0), ("b", 100))
    ]
    mixture = Mixture(sets, {"a": 3.0, "b": 1.0}, seed=5)
    whole = mixture.batch(7, 64, 0, 1)
    parts = torch.cat([mixture.batch(7, 64, rank, 4) for rank in range(4)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, mixture.batch(8, 64, 0, 1))
    many = torch.cat([mixture.batch(step, 64, 0, 1)[:, 0, 0, 0] for step in range(60)])
    assert 0.70 < (many < 100).float().mean() < 0.80
    by_size = Mixture([PixelSet("a", torch.zeros(90, 3, 2, 2)), PixelSet("b", torch.zeros(10, 3, 2, 2))], {}, 0)
    np.testing.assert_allclose(by_size.share, [0.9, 0.1])


def test_learning_rate_rises_and_reaches_zero():
    config = TokenizerTrainingConfig(max_steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert 0 < factors[-1] <= 0.011


def test_loss_weighs_edges_and_vanishes_for_equal_images():
    image = torch.zeros(1, 3, 8, 8)
    assert reconstruction_loss(image, image, 0.5) == 0
    flat, checked = image + 0.1, image.clone()
    checked[..., ::2] += 0.1
    checked[..., 1::2] -= 0.1
    assert reconstruction_loss(flat, image, 0.0) == pytest.approx(reconstruction_loss(checked, image, 0.0).item())
    assert reconstruction_loss(checked, image, 0.5) > reconstruction_loss(flat, image, 0.5) + 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_small_tokenizers_learn_eight_images(kind, optimizer):
    torch.manual_seed(0)
    config = section(kind, optimizer=optimizer, block_out_channels=[32], codebook_size=64)
    assert config.train is not None
    images = to_float(torch.stack([torch.from_numpy(_scene(seed)).permute(2, 0, 1) for seed in range(8)]))
    model = build_tokenizer(config, 32)
    module = Autoencoder(model, config.train).train()
    optimiser = TokenizerOptimizer(model, config.train)
    codebook = Codebook(model) if kind == "vq" else None
    steps, first = 100, 0.0
    for step in range(steps):
        loss, _, hidden = module(images, torch.randn(8, 4, 8, 8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(1 - step / steps)
        first = first or loss.item()
        if codebook is not None and hidden is not None:
            codebook.count(hidden)
            if step % 20 == 0 and step < 80:
                codebook.revive(hidden, step)
    assert loss.item() < 0.25 * first
    quality = reconstruction_psnr(ImageTokenizer(model, kind), ((images + 1) * 127.5).round().to(torch.uint8))
    assert quality > 15.0


def test_muon_takes_the_hidden_convolutions_and_resumes():
    config = section(optimizer="muon").train
    assert config is not None
    torch.manual_seed(0)
    model = build_tokenizer(section(), 32)
    optimiser = TokenizerOptimizer(model, config)
    hidden = {id(p) for p in optimiser.optimizers[1].param_groups[0]["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert "encoder.mid_block.resnets.0.conv1.weight" in named
    assert not any("conv_in" in name or "conv_out" in name or "norm" in name or "bias" in name for name in named)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step(1.0)
    before = model.encoder.mid_block.resnets[0].conv1.weight.clone()
    restored = TokenizerOptimizer(model, config)
    restored.load_state_dict(optimiser.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    restored.step(1.0)
    assert not torch.equal(before, model.encoder.mid_block.resnets[0].conv1.weight), "the update reaches the kernel itself"


def test_unused_codes_move_onto_encoder_outputs():
    model = build_tokenizer(section("vq", codebook_size=16), 32)
    codebook = Codebook(model)
    hidden = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.quantize.embedding.weight.fill_(50.0)
        model.quantize.embedding.weight[3] = 0.0
    codebook.count(hidden)
    assert codebook.used[3] == 200
    assert codebook.revive(hidden, step=1) == 15
    weight = model.quantize.embedding.weight.detach()
    assert torch.equal(weight[3], torch.zeros(4)), "a code in use stays"
    assert all((hidden == row).all(dim=1).any() for index, row in enumerate(weight) if index != 3)
    codebook.count(hidden)
    assert (codebook.used > 0).float().mean() > 0.7


def test_psnr_against_its_definition():
    images = torch.zeros(2, 3, 4, 4)
    off = images.clone()
    off[1] += 0.2
    assert psnr(images, off)[1].item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(images, off)[0] == 100.0


def test_pixels_are_decoded_resized_and_counted(tmp_path):
    (tar,) = write_shards(samples("train", 5, 64, 0), tmp_path / "shards", 8)
    broken = {**next(iter(samples("validation", 1, 64, 0))), "__key__": "broken", "image_bytes": b"not an image"}
    (other,) = write_shards([broken], tmp_path / "more", 8)
    assert list_tars([f"3::{tmp_path}/shards", f"{tmp_path}/more/*.tar"], "data.sources") == [tar, other]
    names, bad = collect_pixels([tar, other], 32, tmp_path / "pixels")
    assert (names, bad) == (["shapes"], 1)
    (pixels,) = open_pixels(tmp_path / "pixels", names)
    assert pixels.images.shape == (5, 3, 32, 32)
    assert pixels.images.dtype == torch.uint8
    with pytest.raises(ValueError, match="none of the images"):
        collect_pixels([other], 32, tmp_path / "none")


def _scene(seed: int) -> np.ndarray:
    from fluid_core.data import shapes

    scene = next(shapes.scenes("train", 1, seed))
    return shapes.render(scene.cells, 32)


def test_folded_input_matches_the_loaded_tokenizer(tmp_path):
    """What training feeds the model is what ImageTokenizer feeds it."""
    model = build_tokenizer(section(), 32)
    tokenizer = ImageTokenizer(model, "kl")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(tokenizer.encode(images)[:, :4], model.encode(F.pixel_unshuffle(images, 4)).latent_dist.mean)
