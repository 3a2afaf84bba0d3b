"""The HTTP face: OpenAI's image routes, health, metrics and the studio page, as one FastAPI application.

It holds no model. Replicas of the Generator deployment do the work; the Dispatcher reaches them.
"""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from fluid_core import __version__
from fluid_core.config import Recipe
from fluid_core.serving.dispatch import Dispatcher
from fluid_core.serving.edits import EDIT_BODY, EditForm, edit_form
from fluid_core.serving.errors import ApiError, bad_request, model_not_found, unavailable
from fluid_core.serving.http import BodyLimit, Guard, RequestCounter, answers, install_error_handlers
from fluid_core.serving.keys import Authenticator, RateLimiter, load_keys
from fluid_core.serving.metrics import ServingMetrics
from fluid_core.serving.safety import load_safety_hook
from fluid_core.serving.schema import GenerationBody, ImageData, ImagesResponse, ModelInfo, ModelList, Usage
from fluid_core.serving.tasks import ImageTask, TaskEvent

logger = logging.getLogger(__name__)

FIRST_ANSWER_SECONDS = 30.0
DESCRIBE_SECONDS = 10.0
"""For a replica to say which model it serves: it does so from memory, but one that is being replaced never does."""
STUDIO = Path(__file__).parent / "studio" / "index.html"
WARM_UP_PROMPT = "a red circle"
PREVIEWS = 3
"""Of a stream whose client does not say how many."""
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}},
}
_SSE: dict[str, Any] = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}


class Gateway:
    """State of one gateway process; `create_app` makes its routes."""

    def __init__(self, recipe: Recipe, generator: Any):
        self.config = recipe.serving
        self.generator = generator
        self.metrics = ServingMetrics()
        self.dispatcher = Dispatcher(generator, recipe.serving, self.metrics)
        keys = load_keys(self.config.api_keys_file) if self.config.api_keys_file else None
        self.authenticator = Authenticator(keys)
        self.limiter = RateLimiter(self.config.requests_per_minute)
        self.safety = load_safety_hook(self.config.safety_hook, self.config.blocked_words_file)
        self.info: ModelInfo | None = None
        self._described = asyncio.Event()
        self.ready = False

    async def refresh_info(self) -> ModelInfo:
        """Ask a replica which model it serves."""
        self.info = ModelInfo(**await self.generator.describe.remote())
        self._described.set()
        return self.info

    async def known_info(self) -> ModelInfo:
        """The served model. A gateway that has just been started, as in a redeploy, lets its first requests wait for it.

        Raises:
            ApiError: 503, no replica has answered yet.
        """
        try:
            await asyncio.wait_for(self._described.wait(), FIRST_ANSWER_SECONDS)
        except TimeoutError:
            raise unavailable(self.not_ready_because) from None
        assert self.info is not None
        return self.info

    async def current_info(self) -> ModelInfo:
        """The model that is served now.

        Raises:
            ApiError: 503, no replica answers: none is ready yet, or the one that was is being replaced.
        """
        if self.info is None:
            raise unavailable(self.not_ready_because)
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                return await self.refresh_info()
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("no replica says which model it serves: %r", error)
            raise unavailable("no replica answers; ask again later") from None

    def made_by(self, label: str) -> None:
        """Called with the `name:version` that made an image: after a change of the served version its sizes are asked for anew."""
        if self.info is not None and label not in _names(self.info):
            self._looking = asyncio.create_task(self._look_again())

    async def _look_again(self) -> None:
        with suppress(ApiError):
            await self.current_info()

    async def become_ready(self) -> None:
        """Generate one real image through the whole way; until that worked /readyz says 503."""
        while True:
            try:
                await self.refresh_info()
                await self.dispatcher.images(ImageTask(WARM_UP_PROMPT, 1, seed=0))
                break
            except Exception as error:
                self.not_ready_because = str(error)
                await asyncio.sleep(1.0)
        self.ready = True
        self.metrics.ready.set(1)

    not_ready_because = "the model is being loaded"

    async def task_of(self, body: GenerationBody, background: bool = False) -> ImageTask:
        """A checked request as a task.

        Raises:
            ApiError: 400 or 404, naming the field.
        """
        info = await self.known_info()
        if body.model is not None and body.model not in _names(info):
            # The champion may have moved since we last asked.
            info = await self.current_info()
            if body.model not in _names(info):
                raise model_not_found(body.model, info.id)
        if not body.prompt.strip():
            raise bad_request("prompt: it is empty", "prompt")
        for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt or "")):
            if len(text) > self.config.max_prompt_chars:
                raise bad_request(f"{name}: {len(text)} characters, at most {self.config.max_prompt_chars} are taken", name)
        if body.steps is not None and body.steps > self.config.max_steps:
            raise bad_request(f"steps: at most {self.config.max_steps} on this server", "steps")
        if body.partial_images and not body.stream:
            raise bad_request("partial_images: previews need stream: true", "partial_images")
        refusal = self.safety.check_prompt(body.prompt, body.user)
        if refusal is not None:
            raise ApiError(400, "content_policy_violation", refusal, "prompt")
        return ImageTask(
            prompt=body.prompt,
            count=body.n or 1,
            seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
            model=body.model,
            size=self._size(body.size, info),
            steps=body.steps,
            guidance=body.guidance,
            temperature=body.temperature,
            negative_prompt=body.negative_prompt,
            stream=bool(body.stream),
            partial_images=(PREVIEWS if body.partial_images is None else body.partial_images) if body.stream else 0,
            user=body.user,
            deadline=body.deadline,
            background=background,
        )

    def _size(self, size: str | None, info: ModelInfo) -> tuple[int, int] | None:
        if size is None or size == "auto":
            return None
        width, height = (int(side) for side in size.split("x"))
        if width % info.size_multiple or height % info.size_multiple:
            raise bad_request(f"size: width and height must be multiples of {info.size_multiple} for this model", "size")
        if max(width, height) > self.config.max_image_side:
            raise bad_request(f"size: at most {self.config.max_image_side} pixels a side on this server", "size")
        return width, height


def _names(info: ModelInfo) -> set[str]:
    """Under which a client may ask for the model."""
    return {info.id, f"{info.id}:{info.version}", f"{info.id}@{info.alias}"}


def images_response(started: dict[str, Any], images: list[TaskEvent]) -> ImagesResponse:
    """OpenAI's answer object for finished images."""
    data = [ImageData(b64_json=base64.b64encode(event.png).decode(), seed=event.seed) for event in images]
    return ImagesResponse(
        created=int(time.time()), model=started["model"], data=data, size=started["size"], usage=_usage(started, len(images))
    )


def create_app(recipe: Recipe, generator: Any) -> FastAPI:
    """The application; `generator` is the handle of the Generator deployment."""
    from fluid_core.serving.batch_routes import batch_routes

    gateway = Gateway(recipe, generator)
    batches, batch_runner = batch_routes(gateway, recipe)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(gateway.become_ready()), asyncio.create_task(batch_runner.resume_all())]
        yield
        for task in tasks:
            task.cancel()
        await batch_runner.stop()

    app = FastAPI(title="Fluid", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.state.gateway, app.state.batches = gateway, batch_runner
    app.add_middleware(BodyLimit, limit=gateway.config.max_upload_bytes, file_limit=gateway.config.max_file_bytes)
    app.add_middleware(Guard, authenticator=gateway.authenticator, limiter=gateway.limiter)
    app.add_middleware(RequestCounter, metrics=gateway.metrics)
    install_error_handlers(app)
    _add_image_routes(app, gateway)
    app.include_router(batches)
    _add_plain_routes(app, gateway)
    _describe_security(app, gateway)
    return app


async def client_of(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
) -> str:
    """The caller's name, which the Guard has checked. A FastAPI dependency (async: others go through a pool of threads);
    HTTPBearer is there for the OpenAPI document."""
    return request.scope["fluid.client"]


Client = Annotated[str, Depends(client_of)]


def _add_image_routes(app: FastAPI, gateway: Gateway) -> None:
    responses = answers(400, 401, 404, 408, 413, 429, 500, 503, 504) | {200: _SSE}

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=responses, operation_id="generate")
    async def generate(body: GenerationBody, client: Client) -> Any:
        """Images from a prompt. With `stream: true` the answer is server-sent events: previews, then each image."""
        return await _answer(gateway, await gateway.task_of(body), "image_generation")

    @app.post(
        "/v1/images/edits", response_model=ImagesResponse, responses=responses, operation_id="edit", openapi_extra=EDIT_BODY
    )
    async def edit(request: Request, client: Client, form: Annotated[EditForm, Depends(edit_form)]) -> Any:
        """Parts of an image made anew: those where the mask is transparent (or white, in a mask without alpha)."""
        task = await gateway.task_of(form.body)
        task = await asyncio.to_thread(form.apply, task, gateway.info, gateway.config)
        request.scope["fluid.release_upload"]()  # from here on max_queued bounds it
        return await _answer(gateway, task, "image_edit")

    @app.get("/v1/models", response_model=ModelList, responses=answers(400, 401, 429, 503), operation_id="models")
    async def models(client: Client) -> ModelList:
        """The served model: its version, its image size, its defaults."""
        return ModelList(data=[await gateway.current_info()])

    @app.get("/v1/models/{model}", response_model=ModelInfo, responses=answers(400, 401, 404, 429, 503), operation_id="model")
    async def model(model: str, client: Client) -> ModelInfo:
        """One model by name."""
        info = await gateway.current_info()
        if model not in _names(info):
            raise model_not_found(model, info.id)
        return info


def _add_plain_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz", operation_id="healthz")
    async def healthz() -> dict[str, str]:
        """The gateway lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses=answers(503), operation_id="readyz")
    async def readyz() -> dict[str, str]:
        """An image was generated and the server takes requests."""
        if not gateway.ready:
            raise unavailable(gateway.not_ready_because)
        if gateway.dispatcher.draining:
            raise unavailable("the server is shutting down")
        assert gateway.info is not None
        return {"status": "ready", "model": gateway.info.id}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def studio() -> Response:
        if not STUDIO.is_file():
            return Response("Fluid is running; the API is described at /docs\n", media_type="text/plain")
        return FileResponse(STUDIO, media_type="text/html")


async def _answer(gateway: Gateway, task: ImageTask, kind: str) -> Any:
    if not task.stream:
        started, images = await gateway.dispatcher.images(task)
        gateway.made_by(started["model"])
        return images_response(started, images)
    events = gateway.dispatcher.run(task)
    # Errors before the first event still have an HTTP status of their own.
    first = await anext(events)
    gateway.made_by((first.details or {})["model"])
    return StreamingResponse(
        _server_sent(events, first, task, kind), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _server_sent(
    events: AsyncGenerator[TaskEvent, None], first: TaskEvent, task: ImageTask, kind: str
) -> AsyncGenerator[str, None]:
    started = first.details or {}
    common = {
        "size": started["size"],
        "quality": "auto",
        "background": "opaque",
        "output_format": "png",
        "model": started["model"],
    }
    partials = 0
    async with aclosing(events):
        try:
            async for event in events:
                data = {"created_at": int(time.time()), "index": event.index, "seed": task.seed_of(event.index), **common}
                if event.kind in ("partial", "image"):
                    data["b64_json"] = base64.b64encode(event.png).decode()
                if event.kind == "partial":
                    details = event.details or {}
                    yield _sse(f"{kind}.partial_image", data | {"partial_image_index": partials} | details)
                    partials += 1
                elif event.kind == "image":
                    yield _sse(f"{kind}.completed", data | {"usage": _usage(started, 1).model_dump()})
        except ApiError as error:
            yield _sse("error", error.body())


def _sse(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps({'type': event, **data})}\n\n"


def _usage(started: dict[str, Any], images: int) -> Usage:
    text, out = started["text_tokens"], started["image_tokens"] * images
    return Usage(
        input_tokens=text,
        output_tokens=out,
        total_tokens=text + out,
        input_tokens_details={"text_tokens": text, "image_tokens": 0},
    )


def _describe_security(app: FastAPI, gateway: Gateway) -> None:
    """OpenAPI without what never happens: a 422 of its own, and keys where none are asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes, description=__doc__)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if gateway.config.api_keys_file is None:
                        operation.pop("security", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
