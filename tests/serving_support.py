"""What the tests of the server share: a small recipe, a plain HTTP request, images and their difference."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from PIL import Image

from fluid_core.config import Recipe, load_recipe
from fluid_core.generation.pipeline import FluidPipeline


@dataclass
class Server:
    """A running server, and the same model offline."""

    url: str
    recipe: Recipe
    pipeline: FluidPipeline
    folder: Path


def small_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe whose runs are in `folder`, served at any free port; `sections` are settings of `serving`."""
    values = {
        "name": "unit",
        "runs_dir": str(folder / "runs"),
        "data": {},
        "image_tokenizer": {"path": "unused"},
        "text_encoder": {"path": "unused"},
        "encode": {"output": str(folder / "encoded")},
        "registry": {
            "tracking_uri": f"sqlite:///{folder}/runs/mlflow.db",
            "experiment": "unit",
            "model_name": "unit",
            "licence": "Apache-2.0",
        },
        "training": {"sample_prompts": ["a red circle", "two blue square"]},
        "serving": {"port": 0, "max_batch_size": 8, "max_queued": 32, "deadline_seconds": 60, "drain_seconds": 60} | sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def request(
    server: Server | str,
    path: str,
    body: Any = None,
    *,
    raw: bytes | None = None,
    form: dict[str, str] | None = None,
    files: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request; GET without a body."""
    url = (server if isinstance(server, str) else server.url) + path
    headers = dict(headers or {})
    content = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    if content is not None:
        headers["Content-Type"] = "application/json"
    method = method or ("POST" if content is not None or files else "GET")
    answer = httpx.request(method, url, content=content, data=form, files=files, headers=headers, timeout=120)
    return answer.status_code, dict(answer.headers), answer.content


def image_of(encoded: str | None) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded or "")))
    image.load()
    return image


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of any channel of any pixel; 256 for another size."""
    if a.size != b.size:
        return 256
    return int(np.abs(np.asarray(a.convert("RGB"), np.int16) - np.asarray(b.convert("RGB"), np.int16)).max())
