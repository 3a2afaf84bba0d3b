"""The gateway's routes in this process, with a local storage and no replica but a stand-in that says, or does not say, what it
serves."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError
from serving_support import small_recipe

from fluid_core.serving.gateway import create_app

INFO: dict[str, Any] = {
    "id": "unit", "version": "3", "alias": "champion", "created": 0, "image_size": "32x32", "size_multiple": 8, "grid": [4, 4],
    "max_prompt_tokens": 8, "defaults": {},
}  # fmt: skip


async def described() -> dict[str, Any]:
    return INFO


class Replica:
    """In place of the handle of the Generator deployment."""

    def __init__(self) -> None:
        self.describe = SimpleNamespace(remote=described)
        self.generate = self.stream = SimpleNamespace()

    def options(self, **_: Any) -> "Replica":
        return self


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
def app(tmp_path: Path, replica: Replica) -> FastAPI:
    return create_app(small_recipe(tmp_path), replica)


def with_client(app: FastAPI, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        await app.state.gateway.refresh_info()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await test(client)

    asyncio.run(run())


def test_models_say_when_no_replica_answers(app: FastAPI, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluid_core.serving.gateway.DESCRIBE_SECONDS", 0.05)

    async def hangs() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    def fails(error: Exception) -> Callable[[], Awaitable[dict[str, Any]]]:
        async def describe() -> dict[str, Any]:
            raise error

        return describe

    async def test(client: httpx.AsyncClient) -> None:
        for name in ("unit", "unit:3", "unit@champion"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == "unit"
        assert (await client.get("/v1/models/unit@other")).status_code == 404
        for describe in (hangs, fails(ActorDiedError()), fails(DeploymentUnavailableError(None))):  # type: ignore[arg-type]
            replica.describe.remote = describe
            for path in ("/v1/models", "/v1/models/unit"):
                answer = await client.get(path)
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
                assert int(answer.headers["retry-after"]) > 0
        replica.describe.remote = described
        assert (await client.get("/v1/models")).status_code == 200

    with_client(app, test)
