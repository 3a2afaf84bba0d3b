"""Make a trained checkpoint the served model: export, register, check, crown; or go back with --rollback.

    python pipelines/promote.py --config configs/demo.yaml [--run RUN]
    python pipelines/promote.py --config configs/demo.yaml --rollback

The newest complete checkpoint's EMA weights become a bundle, registered by reference in MLflow as `candidate`. When every
gate lets it pass it becomes `champion` and the former one `previous`; the server changes over by itself.
"""

import argparse
import sys
from pathlib import Path

from fluid_core.config import Recipe
from fluid_core.entry import run_pipeline
from fluid_core.registry.models import CHAMPION
from fluid_core.workflow.stage import Stage, stage_digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--run", help="a training run's folder under runs_dir (default: the recipe's own)")
    choice.add_argument("--rollback", action="store_true", help="swap champion and previous")


def main(recipe: Recipe, args: argparse.Namespace) -> int:
    if args.rollback:
        return _rollback(recipe)
    training_dir = Path(recipe.runs_dir) / args.run if args.run else recipe.training_dir
    checkpoints = recipe.training.checkpoint_folder(training_dir)
    # A training run that goes on by itself, outside the workflow, changes its checkpoints but not its stage's record.
    # Copies that someone made beside them (step_00000004.bak) are no checkpoints.
    newest = [str(path) for path in sorted(checkpoints.glob(f"step_{'[0-9]' * 8}/_COMPLETE"))[-1:]]
    stage = Stage(
        recipe,
        "promote",
        [recipe.registry, recipe.generation],
        [stage_digest(recipe, "pretrain"), stage_digest(recipe, "evaluate"), *newest],
    )
    if not args.force and stage.complete() and _is_champion(recipe):
        stage.skip()
        return 0
    from fluid_core.registry.promotion import promote

    stage.path.unlink(missing_ok=True)

    result = promote(recipe, args.run)
    for gate in result.gates:
        print(f"  {'passed ' if gate.passed else 'REFUSED'} {gate.name}: {gate.detail}")
    if not result.crowned:
        refused = ", ".join(gate.name for gate in result.gates if not gate.passed)
        print(f"error: version {result.version} of {result.name} stays candidate, refused by: {refused}", file=sys.stderr)
        return 1
    stage.finish(
        outputs=[result.bundle],
        metrics={f"gate/{gate.name}": gate.value for gate in result.gates if gate.value is not None},
        output_digest=result.bundle_sha256,
        model={"name": result.name, "version": result.version, "alias": "champion"},
    )
    print(
        f"promote: {result.name} version {result.version} is champion{' already' if result.already else ''} ({result.bundle})"
    )
    return 0


def _is_champion(recipe: Recipe) -> bool:
    """Whether the registry still says what the stage's record says: it may be lost, or somebody promoted another model."""
    from fluid_core.registry.model_registry import ModelRegistry, registry_errors

    with registry_errors(recipe.registry):
        champion = ModelRegistry(recipe.registry).version(CHAMPION)
    return champion is not None and champion.tags.get("fluid.bundle_sha256") == stage_digest(recipe, "promote")


def _rollback(recipe: Recipe) -> int:
    from fluid_core.registry.model_registry import ModelRegistry, registry_errors

    with registry_errors(recipe.registry):
        champion, previous = ModelRegistry(recipe.registry).rollback()
    # The stage's record named the version that was taken back: what follows from it must look again.
    Stage(recipe, "promote", []).path.unlink(missing_ok=True)
    print(f"promote: {recipe.registry.model_name} version {champion} is champion again, version {previous} is previous")
    return 0


if __name__ == "__main__":
    run_pipeline(main, __doc__, add_arguments)
