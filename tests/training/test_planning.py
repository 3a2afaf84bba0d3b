"""The planner against what can be measured here, and every recipe built on the meta device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import small_recipe, write_recipe
from torch.utils.flop_counter import FlopCounterMode

from fluid_core.cli import main
from fluid_core.config import PRESETS, ModelConfig, TrainingConfig, load_recipe
from fluid_core.model import fluid
from fluid_core.model.draws import draw_training
from fluid_core.model.fluid import FluidModel
from fluid_core.planning import (
    T5_TOKENS_PER_BATCH,
    activation_bytes,
    count_parameters,
    forward_flops,
    memory_per_gpu,
    plan,
    text_encoder_bytes,
    training_flops,
    variants,
)
from fluid_core.training.engine import deepspeed_config, parameter_groups

RECIPES = ["fluid-166m", "fluid-369m", "fluid-665m", "fluid-1b", "fluid-3b", "fluid-10b"]


def _batch(model: ModelConfig, size: int) -> tuple[torch.Tensor, ...]:
    draws = draw_training(model, torch.arange(size), model.num_tokens)
    tokens = torch.randn(size, model.num_tokens, model.token_channels)
    if model.tokens == "discrete":
        tokens = torch.randint(model.codebook_size, (size, model.num_tokens))
    text = torch.randn(size, model.max_text_tokens, model.text_width)
    return tokens, text, torch.ones(size, model.max_text_tokens, dtype=torch.bool), text[0], draws


@pytest.mark.parametrize("change", [{}, {"objective": "eps"}, {"tokens": "discrete"}, {"order": "raster"}])
def test_analytic_flops_are_those_that_torch_counts(
    tmp_path: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fluid, "on_cpu", lambda x: False)  # what a GPU computes
    model = small_recipe(tmp_path).model.model_copy(update=change)
    built = FluidModel(model)
    batch = _batch(model, 8)
    with FlopCounterMode(display=False) as counter:
        built(*batch)
    masked = batch[-1].count / 8
    assert counter.get_total_flops() / 8 == pytest.approx(forward_flops(model, masked_tokens=masked), rel=0.01)


def test_training_is_three_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the gradients of the inputs, which nobody asks for: 3% at width 128, less in wider models."""
    monkeypatch.setattr(fluid, "on_cpu", lambda x: False)
    model = small_recipe(tmp_path).model.model_copy(update={"width": 128, "text_width": 128, "masked_tokens_per_image": 10})
    built, batch = FluidModel(model), _batch(model, 8)
    with FlopCounterMode(display=False) as counter:
        built(*batch).loss_sum.backward()
    assert counter.get_total_flops() / 8 == pytest.approx(training_flops(model), rel=0.05)


def test_activation_memory_is_what_autograd_keeps(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    model = recipe.model.model_copy(update={"masked_tokens_per_image": 10})
    built = FluidModel(model)
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = built(*_batch(model, 6)).loss_sum
    assert loss.requires_grad
    assert activation_bytes(model, recipe.training, 6) == pytest.approx(sum(kept.values()), rel=0.1)
    less = recipe.training.model_copy(update={"activation_checkpointing": True})
    deep = model.model_copy(update={"blocks": 8})
    assert activation_bytes(deep, less, 6) < 0.6 * activation_bytes(deep, recipe.training, 6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_fits(repository: Path, name: str) -> None:
    recipe = load_recipe(repository / "configs" / f"{name}.yaml")
    training = recipe.training
    assert (training.batch_size, training.learning_rate, training.warmup_steps, training.ema_decay) == (
        2048,
        1e-4,
        65_000,
        0.9999,
    )
    expected = PRESETS[recipe.model.preset].paper_parameters
    parameters = count_parameters(recipe.model, training).total
    assert expected is not None and parameters == pytest.approx(expected, rel=0.05)
    with torch.device("meta"):
        groups = parameter_groups(FluidModel(recipe.model), training)
    assert sum(p.numel() for g in groups for p in g["params"]) == parameters
    assert {(g["part"], g["weight_decay"]) for g in groups} == {("trunk", 0.02), ("trunk", 0.0), ("head", 0.0)}
    config = deepspeed_config(training, training.workers, parameters, torch.device("cuda"))
    micro, accumulate = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert micro * accumulate * training.workers == config["train_batch_size"] == 2048
    t5 = sum(text_encoder_bytes(recipe, training.micro_batch(training.workers)))  # 3.1B and 10.5B encode captions as they train
    result = plan(recipe.model, training, training.workers, "h100", 0.35, 2.048e9, 1.0, text_encoder=t5)
    assert result.fits and (t5 > 9e9) == (recipe.encode.text.mode == "tokens"), result
    assert not (training.compile and training.zero_stage == 3)


def _shapes_only(what: str, recipe: Path) -> Any:
    """What shapes_only.py prints, in a process of its own: the process group is for life."""
    program = Path(__file__).parent / "shapes_only.py"
    done = subprocess.run([sys.executable, "-W", "ignore", program, what, recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_zero3_partitions_of_the_largest_recipe(repository: Path) -> None:
    """DeepSpeed itself cuts the 10.5B parameters for 64 ranks, on tensors without data; our map of the pieces is its own."""
    recipe = load_recipe(repository / "configs" / "fluid-10b.yaml")
    found = _shapes_only("partitions", repository / "configs" / "fluid-10b.yaml")
    assert (
        found["wrong"] == [] and found["total"] == found["parameters"] == count_parameters(recipe.model, recipe.training).total
    )
    assert found["total"] <= found["padded"] < 1.001 * found["total"], "padding is negligible"
    # Each of the five kinds of state, as allocated on one rank, is that rank's padded share.
    assert found["states"] == dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "ema"), found["padded"] // 64)
    planned = memory_per_gpu(recipe.model, recipe.training, 64)
    assert planned["ema"] == pytest.approx(4 * found["states"]["ema"], rel=0.001)
    assert planned["optimizer"] == pytest.approx(12 * found["states"]["master"], rel=0.001)


def test_planned_memory_is_what_training_allocates(tmp_path: Path) -> None:
    """The most that two real steps hold, on one of four ranks, at every ZeRO stage, with few and with many activations."""
    path = write_recipe(tmp_path, workers=4, batch_size=16)
    values = yaml.safe_load(path.read_text())
    values["model"] |= {"width": 192, "masked_tokens_per_image": 10}
    path.write_text(yaml.safe_dump(values))
    for setting in _shapes_only("memory", path):
        planned = setting["planned"]
        assert sum(planned.values()) == pytest.approx(setting["peak"], rel=0.1), setting
        # The gradients' partition of stage 3 is there from the start; other stages make theirs in the backward pass.
        kept = ("parameters", "optimizer", "ema", "host", *(["gradients"] if setting["zero_stage"] == 3 else []))
        assert sum(planned.get(kind, 0.0) for kind in kept) == pytest.approx(setting["states"], rel=0.05), setting


@pytest.mark.parametrize(
    ("preset", "micro_batch", "checkpointing", "objective", "gib"),
    [
        ("fluid-369m", 352, False, "flow", 105.1),
        ("fluid-1.1b", 176, False, "flow", 122.1),
        ("fluid-1.1b", 128, False, "flow", 94.8),
        ("fluid-1.1b", 128, False, "eps", 99.5),
        ("fluid-3.1b", 44, False, "flow", 113.0),
        ("fluid-3.1b", 132, True, "flow", 98.3),
    ],
)
def test_planned_memory_is_what_an_h200_took(
    preset: str, micro_batch: int, checkpointing: bool, objective: Any, gib: float
) -> None:
    """Measured with benchmarks/train_gpu.py, `--zero-stage 0 --compile` (docs/training.md)."""
    precision: Any = "bf16" if objective == "flow" else "fp32"
    model = ModelConfig(preset=preset, text_width=4096, max_text_tokens=128, objective=objective, head_precision=precision)
    training = TrainingConfig(
        batch_size=micro_batch, workers=1, micro_batch_size=micro_batch, zero_stage=0, compile=True, activation_checkpointing=checkpointing
    )  # fmt: skip
    assert sum(memory_per_gpu(model, training, 1).values()) / 2**30 == pytest.approx(gib, rel=0.05)


def test_planned_memory_of_the_text_encoder_is_what_t5_xxl_works_with(repository: Path) -> None:
    path = repository / "configs" / "fluid-10b.yaml"
    recipe = load_recipe(path)
    measured = _shapes_only("t5", path)
    weights, working = text_encoder_bytes(recipe, T5_TOKENS_PER_BATCH // recipe.text_encoder.max_tokens)
    assert weights == pytest.approx(measured["weights"], rel=0.001)
    assert working == pytest.approx(measured["working"], rel=0.02)


def test_stages_and_offload_move_memory_as_expected() -> None:
    model = ModelConfig(preset="fluid-369m")
    training = TrainingConfig(batch_size=64, workers=8, micro_batch_size=8)
    p = count_parameters(model, training)
    by_stage = [memory_per_gpu(model, training.model_copy(update={"zero_stage": s}), 8, p) for s in range(4)]
    assert by_stage[0]["optimizer"] == 8 * p.total and by_stage[3]["optimizer"] == 1.5 * p.total, "with fp32 masters"
    assert by_stage[3]["parameters"] < 0.5 * by_stage[2]["parameters"] and by_stage[2]["gradients"] < by_stage[1]["gradients"]
    offloaded = memory_per_gpu(model, training.model_copy(update={"offload_optimizer": True}), 8, p)
    assert offloaded["optimizer"] == 0 and offloaded["host"] > p.total
    assert len(variants(training)) == 14


def test_plan_command(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(repository / "configs" / "fluid-10b.yaml")

    def run(*arguments: str) -> tuple[int, dict[str, object]]:
        with pytest.raises(SystemExit) as end:
            main(["plan", "--config", config, "--gpu", "h100", "--json", *arguments])
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    code, result = run("--gpus", "64")
    assert code == 0 and result["fits"] and set(result) >= {
        "parameters", "memory_per_gpu_gib", "checkpoint_gib", "images_per_second", "days", "cost_usd", "fits", "advice",
    }  # fmt: skip
    assert result["checkpoint_gib"] == pytest.approx(16 * result["parameters"] / 2**30, rel=0.01)  # type: ignore[operator]
    code, result = run("--gpus", "2", "--set", "training.activation_checkpointing=false")
    assert code == 1 and "activation_checkpointing: true" in str(result["advice"])
    code, result = run("--gpus", "1", "--set", *("training.micro_batch_size=1", "training.batch_size=64"))
    assert code == 1 and "set training.offload_optimizer: true and use" in str(result["advice"])
    config = str(repository / "configs" / "fluid-166m.yaml")  # its blocks are compiled, which stage 3 refuses
    code, result = run("--gpus", "8", "--set", "training.micro_batch_size=2048", "training.batch_size=16384")
    assert code == 1 and "set training.zero_stage: 3, training.compile: false" in str(result["advice"])
    # Stage 3 alone would do if blocks could stay compiled; without that they keep more.
    code, result = run("--gpus", "8", "--set", "training.micro_batch_size=330", "training.batch_size=2640")
    assert result["advice"] == (
        "does not fit; set training.zero_stage: 3, training.compile: false, training.activation_checkpointing: true"
    )
    code, rows = run("--gpus", "8", "--set", "training.micro_batch_size=8", "--what-if")
    assert code == 0 and isinstance(rows, list) and len(rows) == 14
    assert all(row["compile"] == (row["zero_stage"] < 3) for row in rows)
    last = next(row for row in rows if row["zero_stage"] == 3)
    _, result = run("--gpus", "8", "--set", "training.micro_batch_size=8", "training.zero_stage=3", "training.compile=false")
    assert last["memory_gib"] == result["memory_per_gpu_gib"]["total"]  # type: ignore[index]
    code, rows = run("--gpus", "8", "--set", "training.micro_batch_size=8", "training.compile=false", "--what-if")
    memory = {tuple(list(row.values())[:3]): row["memory_gib"] for row in rows}  # type: ignore[attr-defined]
    for (stage, checkpointing, offload), gib in memory.items():
        assert memory.get((stage - 1, checkpointing, offload), gib) >= gib, "a higher stage takes less"
        assert memory.get((stage, checkpointing, not offload), 0) < gib or offload, "and so does offload"
        assert memory[stage, True, offload] <= gib, "and checkpointing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus 0: give a number that is at least 1"),
        (["--mfu", "0"], "--mfu 0: give a number that is above 0 and at most 1"),
        (["--mfu", "1.1"], "--mfu 1.1: give"),
        (["--samples", "0"], "--samples 0: give a number that is above 0"),
        (["--samples", "-5"], "--samples -5: give"),
        (["--samples", "nan"], "--samples nan: give"),
        (["--write", "0"], "--write 0: give a number that is above 0"),
        (["--write", "inf"], "--write inf: give"),
        (["--usd", "-1"], "--usd -1: give a number that is 0 or above"),
        (["--set", "training.compile=true", "training.zero_stage=3"], "training: compile needs zero_stage 0, 1 or 2"),
        (
            ["--set", "training.offload_optimizer=true", "training.compile=false", "training.zero_stage=0"],
            "training: offload_optimizer needs zero_stage 1, 2 or 3",
        ),
    ],
)
def test_what_cannot_be_is_not_planned(
    arguments: list[str], words: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options out of their range, and what no training would start with."""
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config", str(repository / "configs" / "fluid-166m.yaml"), "--gpus", "8", *arguments])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and words in error and "\n" not in error, error


def test_a_price_of_nothing_and_few_samples_are_taken_at_their_word(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "plan",
                "--config",
                str(repository / "configs" / "fluid-166m.yaml"),
                "--gpus",
                "8",
                "--samples",
                "1",
                "--usd",
                "0",
                "--json",
            ]
        )
    result = json.loads(capsys.readouterr().out)
    assert result["days"] == 0 and result["cost_usd"] == 0
