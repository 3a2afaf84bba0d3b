"""The stage `encode_dataset`: the train and validation outputs of a recipe, made by one Ray Data graph."""

from contextlib import nullcontext

from fluid_core.config import Recipe, config_hash
from fluid_core.encoding.run import Throughput, encode_outputs, prepare_output
from fluid_core.encoding.settings import resolve_settings
from fluid_core.entry import ray_session
from fluid_core.latents.manifest import Manifest
from fluid_core.registry.tracking import Tracker
from fluid_core.workflow.stage import Stage


def encode_dataset(recipe: Recipe, force: bool = False) -> list[Manifest]:
    """Encode what the recipe names and write the stage's record. Returns the manifests: train, and validation if named.

    Raises:
        ValueError, PermissionError, ConnectionError: with one line that says what to do.
    """
    if recipe.text_encoder.create is not None:
        from fluid_core.encoders.stand_in import ensure_text_encoder  # imports torch and transformers

        ensure_text_encoder(recipe)
    settings = resolve_settings(recipe)
    wanted = [(recipe.data.sources, recipe.encode.output)]
    if recipe.encode.validation_output:
        if not recipe.data.validation_sources:
            raise ValueError(
                "encode.validation_output is set, but data.validation_sources is empty: name some, or drop the output"
            )
        wanted.append((recipe.data.validation_sources, recipe.encode.validation_output))
    elif recipe.data.validation_sources:
        raise ValueError("data.validation_sources is set, but encode.validation_output is not: name a folder for it")
    outputs = [prepare_output(sources, root, settings, force) for sources, root in wanted]
    plan_ids = [shard.id for output in outputs for shard in output.plan]
    stage = Stage(recipe, "encode_dataset", config=[settings.fingerprint()], inputs=plan_ids + [root for _, root in wanted])
    if stage.skip(force):
        return []
    pending = any(output.pending() for output in outputs)
    with ray_session() if pending else nullcontext():
        manifests, throughput = encode_outputs(outputs, settings, recipe.encode)
    _record(stage, recipe, [root for _, root in wanted], manifests, throughput)
    return manifests


def _record(stage: Stage, recipe: Recipe, roots: list[str], manifests: list[Manifest], throughput: Throughput) -> None:
    """The stage's record, the run's speed beside each data set, and MLflow's dataset inputs."""
    totals = [manifest.counts for manifest in manifests]
    counts = {
        "in": sum(t["in"] for t in totals),
        "out": sum(t["out"] for t in totals),
        "filtered": sum(sum(t["filtered"].values()) for t in totals),
        "quarantined": sum(sum(t["quarantined"].values()) for t in totals),
    }
    metrics = {
        "encode/images_per_second": round(throughput.images_per_second, 2),
        "encode/seconds": round(throughput.seconds, 2),
        "encode/megabytes": round(sum(s.bytes + s.text_bytes for m in manifests for s in m.shards) / 1e6, 3),
    }
    with Tracker(recipe.registry.tracking_uri, recipe.registry.experiment, "encode_dataset") as tracker:
        tracker.log_metrics({**metrics, **{f"encode/{name}": float(number) for name, number in counts.items()}}, step=0)
        for root, manifest in zip(roots, manifests, strict=True):
            tracker.log_dataset(root, manifest.hash, root)
    stage.finish(
        outputs=[f"{root}/manifest.json" for root in roots],
        metrics=metrics,
        counts=counts,
        output_digest=config_hash([manifest.hash for manifest in manifests]),
        manifests={root: manifest.hash for root, manifest in zip(roots, manifests, strict=True)},
    )
    for root, manifest in zip(roots, manifests, strict=True):
        print(f"{root}: {describe(manifest)}")


def describe(manifest: Manifest) -> str:
    """One line: what went in and what became of it."""
    c = manifest.counts

    def reasons(counted: dict[str, int]) -> str:
        text = ", ".join(f"{reason} {number}" for reason, number in counted.items())
        return f"{sum(counted.values())}" + (f" ({text})" if text else "")

    line = f"{c['in']} in = {c['out']} out + {reasons(c['filtered'])} filtered + {reasons(c['quarantined'])} quarantined"
    return line + (f"; {c['shards_set_aside']} shards set aside" if c["shards_set_aside"] else "")
