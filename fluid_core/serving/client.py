"""A plain HTTP client for the server, standard library only: what `pipelines/serve.py --check` and the demo use."""

import base64
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class ServedImage:
    prompt: str
    path: Path
    seed: int
    model: str


def post_json(url: str, body: dict[str, Any], api_key: str | None = None, timeout: float = 600.0) -> dict[str, Any]:
    """POST a JSON body. Raises ConnectionError with the server's message."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from None
    except OSError as error:
        raise ConnectionError(f"{url} does not answer: {error}") from None


def generate_to_folder(
    url: str, prompts: list[str], folder: Path, seed: int = 0, api_key: str | None = None, concurrency: int = 16
) -> list[ServedImage]:
    """One image a prompt, as `<folder>/000.png` and so on; the requests run side by side, so that they share batches."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(index: int) -> ServedImage:
        answer = post_json(f"{url}/v1/images/generations", {"prompt": prompts[index], "seed": seed + index}, api_key)
        path = folder / f"{index:03d}.png"
        path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
        return ServedImage(prompts[index], path, answer["data"][0]["seed"], answer["model"])

    with ThreadPoolExecutor(concurrency) as pool:
        return list(tqdm(pool.map(one, range(len(prompts))), total=len(prompts), desc="serve", unit="image"))
