"""Where a model came from: the tags of its version, the facts of its card."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from fluid_core import __version__
from fluid_core.config import Recipe, config_hash


def code_version() -> str:
    """The git commit of this checkout, with `+changes` when files differ from it; else the package's version."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__


def _git(root: Path, *arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return found.stdout.strip()


def manifest_summary(root: str | None) -> dict[str, Any]:
    """{"uri", "digest", "rows"} of an encoded data set (local or s3://); empty where there is none."""
    from fluid_core.latents.reader import EncodedDataset

    if root is None:
        return {}
    try:
        manifest = EncodedDataset(root).manifest
    except ValueError:
        return {}
    return {"uri": root, "digest": manifest.hash, "rows": manifest.rows}


def validation_loss(training_dir: Path, step: int) -> float | None:
    """The EMA weights' validation loss that the trainer logged last up to `step` (validation.jsonl), or None."""
    path = training_dir / "validation.jsonl"
    best: tuple[int, float] | None = None
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        # A resumed run repeats steps: what it wrote last stands.
        if record["step"] <= step and (best is None or record["step"] >= best[0]):
            best = (record["step"], float(record["validation_loss_ema"]))
    return None if best is None else best[1]


def _fitting(data: list[dict[str, Any]]) -> str:
    """As JSON, as many as a tag of the registry holds."""
    while len(text := json.dumps(data)) > 5000:
        data = data[:-1]
    return text


def lineage_tags(recipe: Recipe, checkpoint: Path, step: int, bundle_sha256: str, data: list[dict[str, Any]]) -> dict[str, str]:
    """Tags that let anyone find what made a version."""
    tags = {
        "fluid.bundle_sha256": bundle_sha256,
        "fluid.config_hash": config_hash(recipe),
        "fluid.code_version": code_version(),
        "fluid.checkpoint": str(checkpoint),
        "fluid.step": str(step),
        "fluid.recipe": recipe.name,
        "fluid.data": _fitting(data),
    }
    job = os.environ.get("RAY_JOB_ID")
    return tags | ({"fluid.ray_job": job} if job else {})
