"""From a checkpoint to the champion: export, register, check, crown."""

import io
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from fluid_core.config import Recipe, config_hash
from fluid_core.registry.bundle import CARD, SAMPLES, SIGNATURE, add_files, bundle_digest, mlmodel
from fluid_core.registry.bundle_store import upload_bundle
from fluid_core.registry.card import model_card, registry_description
from fluid_core.registry.gates import Gate, bundle_gate, images_gate, metric_gates, validation_gate
from fluid_core.registry.lineage import lineage_tags, manifest_summary, validation_loss
from fluid_core.registry.model_registry import ModelRegistry, registry_errors
from fluid_core.registry.models import CHAMPION
from fluid_core.registry.tracking import Tracker
from fluid_core.workflow.stage import stage_record

VALIDATION_LOSS, VALIDATION_DATA = "fluid.validation_loss", "fluid.validation_data"
DEFAULT_PROMPTS = ["a red circle", "two blue squares"]


@dataclass(frozen=True)
class Promotion:
    """How it ended: `version` is champion when `crowned`, else it stays candidate with the gates that refused it."""

    name: str
    version: str
    crowned: bool
    bundle: Path
    bundle_sha256: str
    gates: list[Gate] = field(default_factory=list)
    already: bool = False


def promote(recipe: Recipe, run: str | None = None) -> Promotion:
    """Export the newest complete checkpoint of a run (default: the recipe's own), and make it champion if the gates let it.

    Raises:
        ValueError: no checkpoint, another promotion at work (PromotionInProgress), or the champion changed meanwhile.
        ConnectionError: the registry does not answer.
    """
    with registry_errors(recipe.registry):
        return _promote(recipe, run)


def _promote(recipe: Recipe, run: str | None) -> Promotion:
    training_dir = Path(recipe.runs_dir) / run if run else recipe.training_dir
    checkpoint, step = newest_checkpoint(training_dir, recipe)
    registry = ModelRegistry(recipe.registry)
    folder = export(recipe, checkpoint, step)
    digest = bundle_digest(folder)
    champion = registry.version(CHAMPION)
    if champion is not None and champion.tags.get("fluid.bundle_sha256") == digest:
        return Promotion(registry.name, str(champion.version), True, folder, digest, already=True)

    trained = Recipe.model_validate(json.loads((checkpoint / "state.json").read_text())["recipe"])
    data = [summary for summary in (manifest_summary(path) for path in _datasets(trained)) if summary]
    tags = lineage_tags(trained, checkpoint, step, digest, data)
    tags |= {"fluid.licence": recipe.registry.licence, "fluid.attribution": recipe.registry.attribution}
    metrics = _evaluation(recipe, folder)
    loss = validation_loss(training_dir, step)
    tags[VALIDATION_DATA] = _validation_digest(trained)
    if loss is not None:
        tags[VALIDATION_LOSS] = repr(loss)

    with Tracker(
        recipe.registry.tracking_uri, recipe.registry.experiment, f"promote {registry.name} step {step}", tags=tags
    ) as tracker:
        registry.ensure(f"Fluid text-to-image model of the recipe {recipe.name}")
        version = registry.claim(_source(recipe, folder), tracker.run_id, tags, "being checked")
        state = "failed"
        try:
            gates, images, facts = _check(recipe, trained, folder, checkpoint, loss, metrics, champion)
            # What was trained is the run's own; how it is used and under which name and licence, the recipe's at hand.
            shown = trained.model_copy(update={"generation": recipe.generation, "registry": recipe.registry})
            prompts = fixed_prompts(trained)
            card = model_card(shown, tags, data, facts["parameters"], loss, metrics, gates, facts["pixels"], prompts)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            files = {CARD: card.encode(), SIGNATURE: mlmodel(registry.name, created, facts["pixels"]).encode()}
            if images:
                samples = io.BytesIO()
                sample_grid(images).save(samples, "PNG")
                files[SAMPLES] = samples.getvalue()
            add_files(folder, files)
            description = registry_description(card, step, gates, _source(recipe, folder))
            registry.client.update_model_version(registry.name, version, description=description)
            _log(tracker, gates, images, metrics, folder, version)
            crowned = all(gate.passed for gate in gates)
            if crowned:
                if "://" in _source(recipe, folder):
                    upload_bundle(folder, _source(recipe, folder))
                registry.crown(version, None if champion is None else str(champion.version))
            state = "promoted" if crowned else "refused"
        finally:
            registry.settle(version, state)
    return Promotion(registry.name, version, crowned, folder, digest, gates)


def export(recipe: Recipe, checkpoint: Path, step: int) -> Path:
    """The bundle of a checkpoint, written once (the writer makes it appear complete or not at all)."""
    from fluid_core.training.export import export_bundle

    bundles = recipe.registry.bundles
    root = Path(bundles) if bundles and "://" not in bundles else recipe.run_dir / "bundles"
    # The marker holds the hash of the checkpoint's state, and with it of its weights; generation defaults travel in the bundle.
    key = config_hash((checkpoint / "_COMPLETE").read_text(), recipe.generation, recipe.image_tokenizer, recipe.text_encoder)
    folder = root / f"{recipe.registry.model_name}-step-{step:08d}-{key[:8]}"
    if not (folder / "manifest.json").is_file():
        export_bundle(checkpoint, recipe, folder)
    return folder


def _source(recipe: Recipe, folder: Path) -> str:
    """Where the registry says the bundle lies: under registry.bundles when that is on S3, else the folder."""
    bundles = recipe.registry.bundles
    return f"{bundles.rstrip('/')}/{folder.name}" if bundles and "://" in bundles else str(folder.absolute())


def newest_checkpoint(training_dir: Path, recipe: Recipe) -> tuple[Path, int]:
    """(folder, step) of the newest checkpoint whose files are whole. Raises ValueError when a run has none."""
    from fluid_core.training.checkpoint import latest_complete
    from fluid_core.training.remote import RemoteCheckpoints, fetch_newest

    root, uri = recipe.training.checkpoint_folder(training_dir), recipe.training.checkpoint_uri
    if uri and training_dir == recipe.training_dir:
        fetch_newest(RemoteCheckpoints(uri), root, report=print)
    found = latest_complete(root, verify=True)
    if found is None:
        raise ValueError(
            f"{uri or root} holds no complete checkpoint: run pipelines/pretrain.py first, or name a run with --run"
        )
    return found.path, found.step


def _evaluation(recipe: Recipe, bundle: Path) -> dict[str, float]:
    """The metrics of stage `evaluate`, if this very bundle is what it scored."""
    record = stage_record(recipe, "evaluate") or {}
    if Path(record.get("bundle", "")).name != bundle.name:
        return {}
    return {name: float(value) for name, value in record["metrics"].items() if isinstance(value, int | float)}


def _datasets(recipe: Recipe) -> list[str]:
    """The encoded data sets, each once: a mixture may name one several times, by source."""
    return list(dict.fromkeys(item.path for item in recipe.training.datasets)) or [recipe.encode.output]


def _check(
    recipe: Recipe,
    trained: Recipe,
    folder: Path,
    checkpoint: Path,
    loss: float | None,
    metrics: dict[str, float],
    champion: Any,
) -> tuple[list[Gate], list[Image.Image], dict[str, Any]]:
    """All gates; the bundle's images of the fixed prompts; {"parameters", "pixels"} for the card."""
    from fluid_core.generation.pipeline import FluidPipeline
    from fluid_core.training.checkpoint import load_ema_state

    gates = [bundle_gate(folder)]
    images: list[Image.Image] = []
    facts: dict[str, Any] = {"parameters": 0, "pixels": (0, 0)}
    if gates[0].passed:
        try:
            pipeline = FluidPipeline.from_pretrained(folder, verify=False)
            facts["parameters"] = sum(p.numel() for p in pipeline.model.parameters())
            gate, images = images_gate(pipeline, load_ema_state(checkpoint), fixed_prompts(trained), trained.seed)
            facts["pixels"] = images[0].size
        except (ValueError, FloatingPointError) as error:  # it does not load, or draws NaN
            gate = Gate("images", False, str(error))
        gates.append(gate)
    best = None if champion is None else champion.tags.get(VALIDATION_LOSS)
    same_data = champion is not None and champion.tags.get(VALIDATION_DATA) == _validation_digest(trained)
    gates.append(validation_gate(recipe.registry, loss, None if best is None else float(best), same_data))
    return gates + metric_gates(recipe.registry, metrics), images, facts


def fixed_prompts(recipe: Recipe) -> list[str]:
    """What every candidate of a recipe draws."""
    return (recipe.training.sample_prompts or DEFAULT_PROMPTS)[:16]


def _validation_digest(recipe: Recipe) -> str:
    return manifest_summary(recipe.encode.validation_output).get("digest", "")


def _log(
    tracker: Tracker, gates: list[Gate], images: list[Image.Image], metrics: dict[str, float], folder: Path, version: str
) -> None:
    """The promotion as an MLflow run: what was checked, what the candidate draws, its card."""
    tracker.log_params({"bundle": str(folder), "version": version})
    tracker.log_metrics({f"gate/{gate.name}": float(gate.passed) for gate in gates}, step=0)
    tracker.log_metrics({f"evaluation/{name.replace('/', '.')}": value for name, value in metrics.items()}, step=0)
    tracker.set_tags({f"gate.{gate.name}": f"{'passed' if gate.passed else 'refused'}: {gate.detail}" for gate in gates})
    if images:
        tracker.log_image(sample_grid(images), "fixed_prompts", step=0)
    tracker.log_artifact(folder / CARD)
    tracker.log_artifact(folder / "manifest.json")


def sample_grid(images: list[Image.Image]) -> Image.Image:
    """Up to eight images a row."""
    columns = min(8, len(images))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), (255, 255, 255))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid
