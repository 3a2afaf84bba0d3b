"""The gateway's routes in this process, with a local storage and no replica but a stand-in that says, or does not say, what it
serves."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError
from serving_support import small_recipe

from fluid_core.data.storage import open_storage
from fluid_core.serving.batch_routes import EVERYONE, serving_storage
from fluid_core.serving.files import FileStore
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


def test_files_are_listed_as_openai_lists_them(app: FastAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(open_storage(serving_storage(small_recipe(tmp_path))))
    (tmp_path / "upload").write_text("{}")
    ids = []
    for second, purpose in enumerate(("batch", "batch", "batch_output", "batch")):
        monkeypatch.setattr("fluid_core.serving.files.time", SimpleNamespace(time=lambda: second))  # noqa: B023
        ids.append(store.create(tmp_path / "upload", "in.jsonl", purpose, EVERYONE).id)  # type: ignore[arg-type]

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        http = httpx.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", max_retries=0, http_client=http) as client:
            assert [file.id for file in (await client.files.list()).data] == ids[::-1]
            assert [file.id async for file in client.files.list(purpose="batch_output")] == [ids[2]]
            page = await client.files.list(purpose="batch", limit=2)
            assert [file.id for file in page.data] == [ids[3], ids[1]] and page.has_more
            assert [file.id async for file in page] == [ids[3], ids[1], ids[0]]
            assert [file.id async for file in client.files.list(order="asc", after=ids[1])] == ids[2:]
            wrong: list[dict[str, Any]] = [
                {"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"purpose": "vision"}, {"after": "file-none"}
            ]  # fmt: skip
            for one in wrong:
                with pytest.raises(openai.BadRequestError) as refused:
                    await client.files.list(**one)
                assert refused.value.param == next(iter(one))

    asyncio.run(run())


def test_fields_of_an_upload_that_the_server_does_not_know_are_refused(app: FastAPI) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for fields, param in (({"expires_after[seconds]": "3600"}, "expires_after"), ({"colour": "red"}, "colour"), ({}, None)):
            form = {"purpose": "batch", **fields}
            answer = await client.post("/v1/files", data=form, files={"file": ("in.jsonl", b"{}")})
            assert answer.status_code == (200 if param is None else 400), answer.text
            assert param is None or answer.json()["error"]["param"] == param
        assert len((await client.get("/v1/files")).json()["data"]) == 1

    with_client(app, test)
