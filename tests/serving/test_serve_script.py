"""pipelines/serve.py: from the start to Ctrl-C; what can be wrong is one clear line, and nothing is started for it."""

import argparse
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_support import Server, metric, request, small_recipe

from fluid_core.config import Recipe
from fluid_core.entry import _batch_policy
from fluid_core.serving.app import check, free_port, wait_ready
from fluid_core.serving.keys import new_key


def serve(repository: Path, recipe: Recipe, *arguments: str) -> Any:
    pipeline = runpy.run_path(str(repository / "pipelines/serve.py"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--force", action="store_true")
    pipeline["add_arguments"](parser)
    return pipeline["main"](recipe, parser.parse_args(arguments))


def test_new_key_is_printed_once(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(tmp_path, api_keys_file=str(tmp_path / "keys"))
    serve(repository, recipe, "--new-key", "ann")
    assert capsys.readouterr().out.startswith("sk-fluid-")
    with pytest.raises(ValueError, match="api_keys_file first"):
        serve(repository, small_recipe(tmp_path), "--new-key", "ann")
    with pytest.raises(ValueError, match="belongs to --check"):
        serve(repository, recipe, "--prompts", "x")


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="another --port"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0


def test_waiting_outlives_what_the_proxy_says_before_it_knows_the_gateway() -> None:
    """Ray Serve's proxy answers plain text until it has the route of the gateway: no reason to give up, and told at the end."""
    answers = [(503, b"no route yet"), (500, b""), (503, b'{"error": {"message": "making an image"}}'), (200, b"{}")]

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) or 9))  # the empty one breaks off
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        wait_ready(url, 30.0)
        for body, reason in (
            (b"no route yet", "no route yet"),
            (b'{"error": {"message": "making an image"}}', "making an image$"),
        ):
            answers[:] = [(503, body)]
            with pytest.raises(ConnectionError, match=f"not ready after 0.1 s: {reason}"):
                wait_ready(url, 0.1)
        proxy.shutdown()


def test_a_cluster_that_serves_already_is_left_alone(server: Server) -> None:
    with pytest.raises(ValueError, match="runs in this Ray cluster already"):
        check(server.recipe)


def test_no_model_is_told_with_the_command_that_makes_one(
    ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def absent(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr(ray, "get_actor", absent)
    with pytest.raises(ValueError, match=r"run pipelines/promote\.py"):
        check(small_recipe(tmp_path))
    with pytest.raises(ValueError, match="not a model bundle"):
        check(small_recipe(tmp_path, model=str(tmp_path)))
    with pytest.raises(ValueError, match="--new-key"):
        check(small_recipe(tmp_path, api_keys_file=str(tmp_path / "absent")))


def test_from_ready_to_ctrl_c(server: Server, repository: Path, tmp_path: Path) -> None:
    """/readyz waits for a real image, each key has a rate, and Ctrl-C finishes what was accepted and takes nothing new."""
    ann, bob = ({"Authorization": f"Bearer {new_key(name, tmp_path / 'keys')}"} for name in ("ann", "bob"))
    keys = {"api_keys_file": str(tmp_path / "keys"), "requests_per_minute": 20}
    small_recipe(tmp_path, model=str(server.folder / "bundle"), **keys)
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    script = [sys.executable, str(repository / "pipelines/serve.py"), "--config", str(tmp_path / "recipe.yaml")]
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*script, "--port", str(port)],
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # a group of its own, as a shell gives it: Ctrl-C reaches the script and its children
        )
    try:
        early: list[float] = []

        def watch() -> None:
            while not early and process.poll() is None:
                with suppress(httpx.HTTPError):
                    if request(url, "/readyz")[0] == 200:
                        early.append(metric(url, "fluid_images_total"))

        watching = threading.Thread(target=watch)
        watching.start()
        assert process.stdout is not None
        said = process.stdout.readline()
        watching.join()
        assert said.startswith(f"Fluid serves bundle at {url}") and early == [1.0], (said, early, errors.read_text())
        ours = psutil.Process(process.pid)
        commands = {" ".join(p.cmdline()): p for p in ours.children(recursive=True)}
        model, gateway = (
            next(p for c, p in commands.items() if f"ServeReplica:fluid:{n}" in c) for n in ("Generator", "Gateway")
        )
        assert {os.sched_getscheduler(p.pid) for p in (model, gateway)} == {batch_policy_here()}
        # The kernel shares a core by niceness: the model goes before those that carry its requests.
        assert model.nice() == ours.nice() < gateway.nice()

        statuses, refused = [], b""
        while not refused and len(statuses) < 60:  # one more is allowed every three seconds, and they take their time
            status, headers, body = request(url, "/v1/models", headers=bob)
            statuses.append(status)
            refused = body if status == 429 else b""
        assert statuses[:20] == [200] * 20 and json.loads(refused)["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(headers["retry-after"]) <= 3

        long = {"prompt": "a red circle", "steps": 256, "size": "128x128", "n": 8}
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(request, url, "/v1/images/generations", long, headers=ann)
            wait_until(lambda: metric(url, "fluid_images_in_flight") == 8)
            os.killpg(process.pid, signal.SIGINT)
            wait_until(lambda: request(url, "/readyz")[0] == 503)
            assert request(url, "/v1/images/generations", {"prompt": "a red circle"}, headers=ann)[0] == 503
            assert not accepted.done()
            status, _, body = accepted.result()
        assert status == 200 and len(json.loads(body)["data"]) == 8
        assert process.wait(60) == 0
        assert free_port("127.0.0.1", port) == port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def batch_policy_here() -> int:
    """What a process gets that asks for SCHED_BATCH: some sandboxes refuse it."""
    with _batch_policy():
        return os.sched_getscheduler(0)


def wait_until(condition: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
