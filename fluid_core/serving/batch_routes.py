"""The routes of `/v1/files` and `/v1/batches`."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import StreamingResponse

from fluid_core.config import Recipe
from fluid_core.data.storage import open_storage
from fluid_core.serving.batches import BatchRunner
from fluid_core.serving.errors import ApiError, bad_request
from fluid_core.serving.files import FileStore
from fluid_core.serving.gateway import Client, Gateway, images_response
from fluid_core.serving.http import answers
from fluid_core.serving.schema import BatchBody, BatchList, BatchObject, FileDeleted, FileList, FileObject, GenerationBody

EVERYONE = "everyone"
After = Annotated[str | None, Query(max_length=64, description="the id that the page before this one ended with")]
_COMMON = answers(400, 401, 429, 500)
_ONE = _COMMON | answers(404)


def serving_storage(recipe: Recipe) -> str:
    """Where files and batches are kept: serving.storage, or a folder of the run."""
    return recipe.serving.storage or str((recipe.run_dir / "serving").absolute())


def batch_routes(gateway: Gateway, recipe: Recipe) -> tuple[APIRouter, BatchRunner]:
    """The router and what runs behind it."""
    storage = open_storage(serving_storage(recipe))
    files = FileStore(storage)

    async def generate(body: GenerationBody) -> dict[str, Any]:
        task = await gateway.task_of(body, background=True)
        return images_response(*await gateway.dispatcher.images(task)).model_dump(mode="json")

    runner = BatchRunner(storage, files, recipe.serving, gateway.metrics, generate)
    router = APIRouter()

    def owner_of(client: str) -> str:
        # Without keys an address is no identity: behind a proxy all clients have one, and one client may have many.
        return client if recipe.serving.api_keys_file else EVERYONE

    @router.post("/v1/files", response_model=FileObject, responses=_COMMON | answers(408, 413), operation_id="create_file")
    async def create_file(
        request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[Literal["batch"], Form()], client: Client
    ) -> Any:
        """Upload the JSONL input of a batch."""
        for field in await request.form():
            name = field.partition("[")[0]
            if name == "expires_after":
                raise bad_request("expires_after: files do not expire here; leave it out, and delete the file in the end", name)
            if name not in ("file", "purpose"):
                raise bad_request(f"{name}: this field is not known", name)

        def keep() -> FileObject:
            with tempfile.NamedTemporaryFile(prefix="fluid-upload-") as local:
                shutil.copyfileobj(file.file, local)
                local.flush()
                return files.create(Path(local.name), file.filename or "", purpose, owner_of(client))

        return await asyncio.to_thread(keep)

    @router.get("/v1/files", response_model=FileList, responses=_COMMON, operation_id="list_files")
    async def list_files(
        client: Client,
        purpose: Literal["batch", "batch_output"] | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: After = None,
    ) -> Any:
        """The caller's files by their age, newest first unless `order` is asc, a page at a time."""
        found = await asyncio.to_thread(files.of_owner, owner_of(client))
        if order == "asc":
            found.reverse()
        return FileList(**_page([file for file in found if purpose in (None, file.purpose)], after, limit))

    @router.get("/v1/files/{file_id}", response_model=FileObject, responses=_ONE, operation_id="get_file")
    async def get_file(file_id: str, client: Client) -> Any:
        return await asyncio.to_thread(files.get, file_id, owner_of(client))

    @router.get(
        "/v1/files/{file_id}/content",
        responses=_ONE | {200: {"content": {"application/jsonl": {"itemSchema": {"type": "object"}}}}},
        response_class=StreamingResponse,
        operation_id="file_content",
    )
    async def file_content(file_id: str, client: Client) -> Any:
        owner = owner_of(client)
        await asyncio.to_thread(files.get, file_id, owner)
        return StreamingResponse(files.content(file_id, owner), media_type="application/jsonl")

    @router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=_ONE, operation_id="delete_file")
    async def delete_file(file_id: str, client: Client) -> Any:
        await asyncio.to_thread(files.delete, file_id, owner_of(client))
        return FileDeleted(id=file_id)

    @router.post(
        "/v1/batches", response_model=BatchObject, responses=_ONE | answers(408, 413, 503), operation_id="create_batch"
    )
    async def create_batch(body: BatchBody, client: Client) -> Any:
        """Start a batch. Its images are made behind those of interactive requests."""
        if gateway.dispatcher.draining:
            raise ApiError(503, "unavailable", "the server is shutting down", retry_after=5)
        return await runner.create(body, owner_of(client))

    @router.get("/v1/batches", response_model=BatchList, responses=_COMMON, operation_id="list_batches")
    async def list_batches(
        client: Client,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: After = None,
    ) -> Any:
        """The caller's batches, newest first, a page at a time."""
        return BatchList(**_page(await runner.of_owner(owner_of(client)), after, limit))

    @router.get("/v1/batches/{batch_id}", response_model=BatchObject, responses=_ONE, operation_id="get_batch")
    async def get_batch(batch_id: str, client: Client) -> Any:
        """A batch with its progress and an estimate of what is left."""
        return await runner.get(batch_id, owner_of(client))

    @router.post("/v1/batches/{batch_id}/cancel", response_model=BatchObject, responses=_ONE, operation_id="cancel_batch")
    async def cancel_batch(batch_id: str, client: Client) -> Any:
        """Stop a batch. What it finished before stays in its output file."""
        return await runner.cancel(batch_id, owner_of(client))

    return router, runner


def _page(found: list[Any], after: str | None, limit: int) -> dict[str, Any]:
    """The fields of a list object for at most `limit` of the files or batches that come after the one of id `after`.

    Raises:
        ApiError: 400, there is none of that id.
    """
    if after is not None:
        ids = [one.id for one in found]
        if after not in ids:
            raise bad_request("after: the list has nothing of that id", "after")
        found = found[ids.index(after) + 1 :]
    page = found[:limit]
    ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {}
    return {"data": page, "has_more": len(found) > limit, **ends}
