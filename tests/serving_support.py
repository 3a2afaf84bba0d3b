"""What the tests of the server share: a small recipe, a plain HTTP request, images and their difference."""

import base64
import io
import json
import socket
import threading
from contextlib import suppress
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


def open_request(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> socket.socket:
    """A request that is sent and not waited for; closing the socket is a client that goes away."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}\r\n".encode() + content)
    return connection


class Relay:
    """Plain TCP between a client and a server that can be cut: for the client the server is away, also in mid-answer."""

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = self._listener.getsockname()
        self.url = "http://{}:{}".format(*self._address)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Refuse new connections and end those that are open."""
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def mend(self) -> None:
        """Listen again at the same address."""
        self._listener = socket.create_server(self._address)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(self._server)
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def metric(server: Server | str, name: str) -> float:
    """A metric of the server, summed over its labels."""
    text = request(server, "/metrics")[2].decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


def image_of(encoded: str | None) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded or "")))
    image.load()
    return image


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of any channel of any pixel; 256 for another size."""
    if a.size != b.size:
        return 256
    return int(np.abs(np.asarray(a.convert("RGB"), np.int16) - np.asarray(b.convert("RGB"), np.int16)).max())
