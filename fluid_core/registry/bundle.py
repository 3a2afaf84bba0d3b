"""What the registry adds to a model bundle (generation/bundle.py): one digest, the card, MLflow's description."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from fluid_core.workflow.stage import write_json_atomic

MANIFEST = "manifest.json"
CARD, SIGNATURE, SAMPLES = "README.md", "MLmodel", "samples.png"
"""What a promotion writes into a bundle that was exported before."""


def read_manifest(folder: str | Path) -> dict[str, str]:
    """file -> sha256. Raises ValueError when there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a complete model bundle: it has no {MANIFEST}; export it again")
    return json.loads(path.read_text())


def bundle_digest(folder: str | Path) -> str:
    """One sha256 for the bundle's weights and settings: not for its card and pictures, which a promotion rewrites."""
    own = {name: digest for name, digest in read_manifest(folder).items() if name not in (CARD, SIGNATURE, SAMPLES)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def add_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Write files into the bundle and into its manifest, which goes on saying of the others what it said.

    Killed in between, the bundle is whole without them.
    """
    folder = Path(folder)
    others = {name: digest for name, digest in read_manifest(folder).items() if name not in files}
    write_json_atomic(folder / MANIFEST, others)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    added = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_json_atomic(folder / MANIFEST, dict(sorted((others | added).items())))


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
