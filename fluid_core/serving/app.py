"""The Ray Serve application, and a server for the duration of a block.

`serve deploy` uses `application` with the recipe as its argument (infra/serve/demo.yaml); pipelines/serve.py uses `serving`.
"""

import json
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from fluid_core.config import Recipe, load_recipe
from fluid_core.registry.mlflow_client import absolute_uri
from fluid_core.registry.models import ModelRef, resolve_model
from fluid_core.serving.generator import Generator
from fluid_core.serving.keys import load_keys
from fluid_core.serving.safety import load_safety_hook

APP_NAME = "fluid"


@serve.ingress()
class GatewayDeployment:
    """The HTTP gateway as a deployment; its routes are made where it runs (gateway.py)."""

    def __init__(self, recipe: dict[str, Any], generator: DeploymentHandle):
        self._recipe, self._generator = Recipe.model_validate(recipe), generator

    def __serve_build_asgi_app__(self) -> Any:
        from fluid_core.serving.gateway import create_app

        self._app = create_app(self._recipe, self._generator)
        return self._app

    async def drain(self) -> None:
        """Take no new work; return when what was taken is answered."""
        await self._app.state.batches.stop()
        await self._app.state.gateway.dispatcher.drained()


def build_app(recipe: Recipe) -> serve.Application:
    """Gateway and Generator, bound together."""
    config = recipe.serving
    plain = absolute_paths(recipe).model_dump(mode="json")
    # The application does its own queueing and refusing, with exact counts; Serve's limits are only a backstop.
    backstop = 2 * config.max_queued + 4096
    common: dict[str, Any] = {
        "max_ongoing_requests": backstop,
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_timeout_s": 60,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    deployment: Any = serve.deployment
    generator = deployment(Generator).options(
        name="Generator",
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            # Ray starts every worker at nice 15. At 0 the model has its core; gateway and proxy share what it leaves.
            "runtime_env": {"env_vars": {"RAY_worker_niceness": "0"}},
        },
        **common,
    )
    gateway = deployment(GatewayDeployment).options(name="Gateway", num_replicas=1, ray_actor_options={"num_cpus": 0}, **common)
    return gateway.bind(plain, generator.bind(plain))


def application(args: dict[str, Any]) -> serve.Application:
    """Builder for a Serve config file: `args: {config: configs/demo.yaml, overrides: [section.key=value]}`."""
    unknown = set(args) - {"config", "overrides"}
    if unknown or "config" not in args:
        raise ValueError(f"args of fluid_core.serving.app:application: config and overrides, not {sorted(args)}")
    return build_app(load_recipe(args["config"], args.get("overrides", [])))


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with every path that serving reads made absolute: replicas have working folders of their own."""
    recipe = recipe.model_copy(deep=True)
    recipe.runs_dir = str(Path(recipe.runs_dir).absolute())
    recipe.registry.tracking_uri = absolute_uri(recipe.registry.tracking_uri)
    for name in ("model", "storage", "api_keys_file", "blocked_words_file"):
        value = getattr(recipe.serving, name)
        if value is not None and ":/" not in value:
            setattr(recipe.serving, name, str(Path(value).absolute()))
    return recipe


@contextmanager
def serving(recipe: Recipe) -> Iterator[tuple[str, ModelRef]]:
    """Start the server, wait until it has made an image, yield (its URL, the model); at the end drain and stop it.

    Needs a Ray session. Raises ValueError (a port in use, no model, a missing file) or ConnectionError (it does not come up).
    """
    config = recipe.serving
    ref = check(recipe)
    port = free_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(
            http_options={"host": config.host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
    except (RayActorError, TimeoutError):
        serve.shutdown()
        raise ConnectionError(
            "Ray Serve's HTTP proxy did not start in time: the machine is too busy, or the cluster was started without "
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60"
        ) from None
    try:
        host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
        url = f"http://{host}:{port}"
        try:
            handle = serve.run(build_app(recipe), name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            raise ConnectionError(f"the server did not start: {deployment_messages() or error}") from None
        wait_ready(url, 300.0)
        try:
            yield url, ref
        finally:
            handle.drain.remote().result(timeout_s=config.drain_seconds)
    finally:
        _stop()


def _stop() -> None:
    """Take the application away; in a cluster that lives on, Serve too. A Ray of our own ends right after this anyway."""
    serve.delete(APP_NAME)
    if os.environ.get("RAY_ADDRESS"):
        serve.shutdown()


def check(recipe: Recipe) -> ModelRef:
    """Everything that can be wrong before work starts. Returns the model that will be served."""
    import ray

    config = recipe.serving
    if config.api_keys_file:
        load_keys(config.api_keys_file)
    load_safety_hook(config.safety_hook, config.blocked_words_file)
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return resolve_model(config.model, recipe.registry)
    raise ValueError(
        "Ray Serve runs in this Ray cluster already: add this application with `serve deploy`, or `serve shutdown` first"
    )


def free_port(host: str, port: int) -> int:
    """`port` if nothing listens there, any free one for 0. Raises ValueError when it is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} on {host} cannot be used ({os.strerror(error.errno or 0)}): give another --port"
            ) from None
        return probe.getsockname()[1]


def wait_ready(url: str, seconds: float) -> None:
    """Poll /readyz. Raises ConnectionError with the server's own reason after `seconds`."""
    until, reason = time.monotonic() + seconds, "no answer"
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            reason = _reason(error)
        except (OSError, HTTPException) as error:
            reason = str(error)
        time.sleep(0.2)
    raise ConnectionError(f"the server at {url} is not ready after {seconds:g} s: {reason}")


def _reason(answer: urllib.error.HTTPError) -> str:
    """The message of an error of ours, or the text that Ray Serve's proxy answers before it knows the gateway."""
    text = ""
    try:
        text = answer.read().decode(errors="replace").strip()
        return str(json.loads(text)["error"]["message"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):  # broken off, or not ours
        return text or str(answer)


def deployment_messages() -> str:
    """What Serve says about deployments that are not healthy, in one line."""
    problems = []
    for app in serve.status().applications.values():
        for name, deployment in app.deployments.items():
            if deployment.message and str(deployment.status.value) != "HEALTHY":
                problems.append(f"{name}: {deployment.message.strip().splitlines()[-1]}")
    return "; ".join(problems)
