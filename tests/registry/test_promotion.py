"""Promotion against a real MLflow registry: gates, aliases, rollback, two at once, killed ones."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import add_checkpoint, fake_run
from PIL import Image

from fluid_core.config import Recipe, RegistryConfig, config_hash
from fluid_core.generation.bundle import verify_bundle
from fluid_core.generation.pipeline import FluidPipeline
from fluid_core.latents.reader import EncodedDataset
from fluid_core.registry.card import MAX_DESCRIPTION, registry_description
from fluid_core.registry.gates import images_gate, metric_gates, validation_gate
from fluid_core.registry.model_registry import OWNER, STARTED, STATE, ModelRegistry, PromotionInProgress
from fluid_core.registry.models import resolve_model
from fluid_core.registry.promotion import export, newest_checkpoint, promote
from fluid_core.training.checkpoint import load_ema_state
from fluid_core.workflow.stage import Stage, stage_record

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return fake_run(tmp_path_factory.mktemp("registry"))


def promote_here(recipe: Recipe, *arguments: str) -> int:
    """pipelines/promote.py in this process: starting another one costs seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--force", action="store_true")
    pipeline = runpy.run_path(str(REPOSITORY / "pipelines/promote.py"))
    pipeline["add_arguments"](parser)
    return pipeline["main"](recipe, parser.parse_args(arguments))


def run(repository: Path, recipe: Recipe, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = Path(recipe.runs_dir).parent / "recipe.yaml"
    command = [sys.executable, str(repository / "pipelines/promote.py"), "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_checkpoint_becomes_champion_and_the_next_one_replaces_it(recipe: Recipe, repository: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrain\.py"):
        promote(recipe)
    add_checkpoint(recipe, 10, loss=0.5, seed=1)
    done = run(repository, recipe)
    assert done.returncode == 0, done.stderr
    assert "version 1 is champion" in done.stdout and "alembic" not in done.stderr
    record = stage_record(recipe, "promote")
    assert record is not None and record["model"] == {"name": "unit", "version": "1", "alias": "champion"}

    again = promote(recipe)
    assert again.already and again.version == "1"

    add_checkpoint(recipe, 20, loss=0.51, seed=2)
    second = promote(recipe)
    registry = ModelRegistry(recipe.registry)
    assert second.crowned and registry.aliases() == {"champion": "2", "previous": "1"}

    ref = resolve_model(None, recipe.registry)
    assert (ref.label, ref.path, ref.alias) == ("unit:2", str(second.bundle), "champion")
    version = registry.client.get_model_version("unit", "2")
    assert version.source == str(second.bundle)
    assert version.tags["fluid.bundle_sha256"] == second.bundle_sha256 and version.tags[STATE] == "promoted"
    assert version.tags["fluid.licence"] == recipe.registry.licence and version.tags["fluid.code_version"]
    assert version.tags["fluid.step"] == "20" and version.tags["fluid.validation_loss"] == "0.51"
    assert json.loads(version.tags["fluid.data"])[0]["uri"] == recipe.encode.output
    card = (second.bundle / "README.md").read_text()
    assert "passed: images" in card and "Apache-2.0" in card and "20 steps of" in card
    # The registry's page shows no pictures, and its list of versions the first line.
    assert "![fixed prompts](samples.png)" in card and "![" not in version.description
    assert version.description.splitlines()[0] == "Step 20: passed every gate."
    assert f'from_pretrained("{second.bundle}")' in version.description and "## Limits" in version.description
    with Image.open(second.bundle / "samples.png") as samples:
        assert samples.size == (64, 32)
    verify_bundle(second.bundle)
    assert "signature" in (second.bundle / "MLmodel").read_text()
    # Registered by reference: the weights did not pass through MLflow.
    stored = sum(p.stat().st_size for p in (Path(recipe.runs_dir) / "mlartifacts").rglob("*") if p.is_file())
    assert not list((Path(recipe.runs_dir) / "mlartifacts").rglob("*.safetensors")) and stored < 2_000_000
    mlflow_run = registry.client.get_run(version.run_id)
    assert mlflow_run.data.metrics["gate/images"] == 1 and mlflow_run.info.status == "FINISHED"
    FluidPipeline.from_pretrained("models:/unit@champion", tracking_uri=recipe.registry.tracking_uri)


def test_a_worse_model_stays_candidate(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert promote_here(recipe) == 0
    add_checkpoint(recipe, 30, loss=0.9, seed=3)
    assert promote_here(recipe) == 1
    assert "stays candidate, refused by: validation_loss" in capsys.readouterr().err
    registry = ModelRegistry(recipe.registry)
    assert registry.aliases() == {"champion": "2", "previous": "1", "candidate": "3"}
    refused = registry.client.get_model_version("unit", "3")
    assert refused.tags[STATE] == "refused" and refused.description.startswith("Step 30: refused by validation_loss.\n")


def test_rollback_swaps_champion_and_previous(recipe: Recipe) -> None:
    assert promote_here(recipe, "--rollback") == 0
    assert stage_record(recipe, "promote") is None
    registry = ModelRegistry(recipe.registry)
    assert registry.aliases()["champion"] == "1" and registry.aliases()["previous"] == "2"
    assert registry.rollback() == ("2", "1")
    # Killed after any of its writes, it is finished by the next one, or begun anew.
    for writes in (1, 2, 3):
        registry = ModelRegistry(recipe.registry)
        left = list(range(writes))
        real = registry.client.set_registered_model_alias

        def dies(*arguments: str, left: list[int] = left, real: Any = real) -> None:
            real(*arguments)
            left.pop()
            if not left:
                raise KeyboardInterrupt

        registry.client.set_registered_model_alias = dies  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            registry.rollback()
        assert ModelRegistry(recipe.registry).rollback() == ("1", "2")
        assert ModelRegistry(recipe.registry).aliases() == {"champion": "1", "previous": "2"} | {
            name: version for name, version in registry.aliases().items() if name == "candidate"
        }
        assert ModelRegistry(recipe.registry).rollback() == ("2", "1")
    with pytest.raises(ValueError, match="no previous version"):
        ModelRegistry(recipe.registry.model_copy(update={"model_name": "empty"})).rollback()


def test_two_promotions_at_once(recipe: Recipe) -> None:
    first, second = ModelRegistry(recipe.registry), ModelRegistry(recipe.registry)
    number = first.claim("/somewhere", None, {}, "")
    with pytest.raises(PromotionInProgress, match=f"version {number} of unit is being promoted by"):
        second.claim("/elsewhere", None, {}, "")
    with pytest.raises(PromotionInProgress):
        second.rollback()

    # Both looked before either registered: the lower number goes on, the other is told and marked.
    blind = ModelRegistry(recipe.registry)
    seen = iter([[], blind.running()])
    blind.running = lambda: next(seen)  # type: ignore[method-assign]
    with pytest.raises(PromotionInProgress, match=f"version {number} "):
        blind.claim("/elsewhere", None, {}, "")
    lost = str(int(number) + 1)
    assert first.client.get_model_version("unit", lost).tags[STATE] == "lost"

    with pytest.raises(ValueError, match="changed meanwhile"):
        first.crown(number, expected_champion="1")
    first.settle(number, "failed")
    assert first.claim("/third", None, {}, "") == str(int(lost) + 1)
    first.settle(str(int(lost) + 1), "failed")


_CLAIM = """
import sys
from fluid_core.config import RegistryConfig
from fluid_core.registry.model_registry import ModelRegistry, PromotionInProgress
registry = ModelRegistry(RegistryConfig.model_validate_json(sys.argv[1]))
registry.running()
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    sys.stdin.readline()
    try:
        mine = registry.claim("/somewhere", None, {}, "")
        print("won", mine, flush=True)
        sys.stdin.readline()
        registry.settle(mine, "failed")
    except PromotionInProgress as error:
        print("told", error, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


def test_two_promotions_at_once_in_two_processes(recipe: Recipe) -> None:
    rounds = 6
    command = [sys.executable, "-c", _CLAIM, recipe.registry.model_dump_json(), str(rounds)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    def all_say() -> list[str]:
        return [process.stdout.readline().strip() for process in both if process.stdout]

    def go() -> None:
        for process in both:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()

    assert all_say() == ["ready", "ready"]
    for _ in range(rounds):
        go()
        said = sorted(all_say())
        assert said[0].startswith("told version ") and said[1].startswith("won "), said
        assert f"told version {said[1].removeprefix('won ')} of unit is being promoted by" in said[0]
        go()
        assert all_say() == ["done", "done"]
    assert [process.wait(60) for process in both] == [0, 0]


def test_a_killed_promotion_does_not_block(recipe: Recipe) -> None:
    registry = ModelRegistry(recipe.registry)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for owner, started in ((f"{os.uname().nodename}:{dead.pid}", "9999999999"), ("elsewhere:1", "1000")):
        number = registry.claim("/somewhere", None, {}, "")
        registry.client.set_model_version_tag("unit", number, OWNER, owner)
        registry.client.set_model_version_tag("unit", number, STARTED, started)
    registry.settle(registry.claim("/somewhere", None, {}, ""), "failed")


def test_gates(recipe: Recipe) -> None:
    config = RegistryConfig(max_validation_loss_increase=0.1, minimum_metrics={"shapes/all": 0.9, "absent": 0.1})
    assert [gate.passed for gate in metric_gates(config, {"shapes/all": 0.95})] == [True, False]
    assert validation_gate(config, 1.09, 1.0, True).passed and not validation_gate(config, 1.11, 1.0, True).passed
    assert validation_gate(config, 5.0, 1.0, False).passed and validation_gate(config, 5.0, None, False).passed
    assert not validation_gate(config, float("nan"), None, True).passed and not validation_gate(config, None, 1.0, True).passed

    bundle = promote(recipe).bundle  # the worse one again
    checkpoints = recipe.training_dir / "checkpoints"
    pipeline = FluidPipeline.from_pretrained(bundle)
    gate, _ = images_gate(pipeline, load_ema_state(checkpoints / "step_00000030"), ["a red circle"], 0)
    assert gate.passed and gate.value == 0
    pipeline = FluidPipeline.from_pretrained(bundle)
    other, _ = images_gate(pipeline, load_ema_state(checkpoints / "step_00000010"), ["a red circle"], 0)
    assert not other.passed and other.value is not None and np.isfinite(other.value)


def test_a_damaged_bundle_is_refused(recipe: Recipe) -> None:
    add_checkpoint(recipe, 40, loss=0.4, seed=4)
    bundle = export(recipe, *newest_checkpoint(recipe.training_dir, recipe))
    weights = next(bundle.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = promote(recipe)
    assert not result.crowned and [gate.name for gate in result.gates if not gate.passed] == ["bundle"]
    # The card of the refusal did not make the manifest true.
    assert not promote(recipe).crowned


def test_weights_that_draw_nothing_are_refused(tmp_path: Path) -> None:
    recipe = fake_run(tmp_path)
    add_checkpoint(recipe, 10, loss=0.5, seed=1, value=1e30)
    result = promote(recipe)
    assert not result.crowned and [gate.name for gate in result.gates if not gate.passed] == ["images"]
    version = ModelRegistry(recipe.registry).client.get_model_version("unit", result.version)
    assert version.tags[STATE] == "refused" and "NaN" in version.description


def test_a_record_is_believed_only_while_the_registry_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fake_run(tmp_path)
    add_checkpoint(recipe, 10, loss=0.5, seed=1)
    first = stage_record(recipe, "promote") if promote_here(recipe) == 0 else None
    assert promote_here(recipe) == 0 and "already complete" in capsys.readouterr().out
    add_checkpoint(recipe, 20, loss=0.4, seed=2)
    assert promote_here(recipe) == 0
    registry = ModelRegistry(recipe.registry)
    registry.client.set_registered_model_alias("unit", "champion", "1")  # from another machine
    capsys.readouterr()
    assert first is not None and promote_here(recipe) == 0
    assert "already complete" not in capsys.readouterr().out
    assert registry.version("champion").tags["fluid.step"] == "20"  # type: ignore[union-attr]

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe.registry.tracking_uri = "http://127.0.0.1:9"
    for arguments in ((), ("--force",), ("--rollback",)):
        with pytest.raises(ConnectionError, match=r"the model registry at http://127\.0\.0\.1:9 does not answer"):
            promote_here(recipe, *arguments)


def test_scores_and_lineage_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """A later checkpoint is not let through on the scores of an earlier one, and another run's has its own recipe's hash."""
    recipe = fake_run(tmp_path, minimum_metrics={"shapes/seen": 0.9})
    add_checkpoint(recipe, 10, loss=0.5, seed=1)
    scored = export(recipe, *newest_checkpoint(recipe.training_dir, recipe))
    Stage(recipe, "evaluate", []).finish([scored], metrics={"shapes/seen": 0.95}, bundle=str(scored))
    assert promote(recipe).crowned
    add_checkpoint(recipe, 20, loss=0.5, seed=2)
    refused = promote(recipe)
    assert not refused.crowned and [gate.name for gate in refused.gates if not gate.passed] == ["shapes/seen"]

    other = recipe.model_copy(deep=True)
    other.training.run_name, other.training.learning_rate = "other", 0.01
    other.training.sample_prompts, other.encode.validation_output = ["a green star"], recipe.encode.output
    add_checkpoint(other, 5, loss=0.4, seed=3)
    registry = ModelRegistry(recipe.registry)
    tags = registry.client.get_model_version("unit", promote(recipe, run="other").version).tags
    assert tags["fluid.config_hash"] == config_hash(other) != config_hash(recipe)
    # Its loss is of its own validation data, and it draws its own prompts.
    assert tags["fluid.validation_data"] == EncodedDataset(recipe.encode.output).manifest.hash
    description = registry.client.get_model_version("unit", str(registry.version("candidate").version)).description  # type: ignore[union-attr]
    assert "a green star" in description and "a red circle" not in description


def test_a_long_card_fits_into_the_registrys_tables() -> None:
    card = "# name\n![fixed prompts](samples.png)\n" + "| metric | 0.5 |\n" * 600
    text = registry_description(card, 7, [], "/bundle")
    assert len(text) <= MAX_DESCRIPTION and text.startswith("Step 7: ") and "README.md" in text.splitlines()[-1]
