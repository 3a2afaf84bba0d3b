"""What the registry adds to a model bundle (generation/bundle.py): one digest, the card, MLflow's description."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from fluid_core.generation.bundle import write_manifest

MANIFEST = "manifest.json"
CARD = "README.md"


def read_manifest(folder: str | Path) -> dict[str, str]:
    """file -> sha256. Raises ValueError when there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a complete model bundle: it has no {MANIFEST}; export it again")
    return json.loads(path.read_text())


def bundle_digest(folder: str | Path) -> str:
    """One sha256 for the bundle's weights and settings: not for its card, which a promotion rewrites."""
    manifest = {name: digest for name, digest in read_manifest(folder).items() if name not in (CARD, "MLmodel")}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def add_files(folder: str | Path, files: dict[str, str]) -> None:
    """Write text files into the bundle and into its manifest."""
    for name, text in files.items():
        (Path(folder) / name).write_text(text)
    write_manifest(folder)


def mlmodel(name: str, created: str, size: tuple[int, int]) -> str:
    """MLflow's description of the model: a flavour of our own (no code runs when it is loaded) and the signature."""
    inputs = [
        {"type": "string", "name": "prompt", "required": True},
        {"type": "long", "name": "seed", "required": False},
        {"type": "long", "name": "num_steps", "required": False},
        {"type": "double", "name": "guidance_scale", "required": False},
    ]
    shape = [-1, size[1], size[0], 3]
    outputs: list[dict[str, Any]] = [{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": shape}}]
    return yaml.safe_dump(
        {
            "flavors": {"fluid": {"loader": "fluid_core.generation.pipeline.FluidPipeline.from_pretrained"}},
            "signature": {"inputs": json.dumps(inputs), "outputs": json.dumps(outputs)},
            "utc_time_created": created,
            "model_name": name,
        },
        sort_keys=False,
    )
