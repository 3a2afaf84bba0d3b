"""What every route shares: body limits, OpenAI's error format, the request's client, counting."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluid_core.serving.errors import ApiError
from fluid_core.serving.keys import Authenticator, RateLimiter
from fluid_core.serving.metrics import ServingMetrics
from fluid_core.serving.schema import ErrorBody

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request is wrong; the message says how",
        401: "missing or wrong API key",
        404: "nothing of that id, or an unknown model",
        408: "the body came too slowly",
        413: "the body is too large",
        429: "the queue is full, or too many requests: see Retry-After",
        500: "an error of the server",
        503: "not ready, draining, or a replica was lost: see Retry-After",
        504: "the deadline passed",
    }.items()
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for its OpenAPI description."""
    return {status: ERRORS[status] for status in statuses}


UPLOADS = ("/v1/images/edits", "/v1/files")
ARRIVING = 16
"""Uploads that arrive or are read at a time: each may take all of its limit in memory before it can be queued or refused."""
JSON_BYTES = 1 << 20
"""The largest body of any other route: two prompts of 32,000 characters are below it, however they are escaped."""
ARRIVAL_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 100_000
"""A body may take ARRIVAL_SECONDS, and longer as far as it comes at this pace: one that trickles in keeps a place from others."""


class BodyLimit:
    """Refuses bodies over a limit before they are read, by Content-Length and by counting what arrives; bodies that come too
    slowly; and uploads while as many as ARRIVING others arrive or are read.

    A route that has made its upload small may give its place back early: `scope["fluid.release_upload"]()`.
    """

    def __init__(self, app: ASGIApp, limit: int, file_limit: int):
        self.app, self.limit, self.file_limit = app, limit, file_limit
        self.arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = {"/v1/files": self.file_limit, "/v1/images/edits": self.limit}.get(scope["path"], JSON_BYTES)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = ApiError(413, "body_too_large", f"the request body is larger than {limit} bytes")
        if declared.isdigit() and int(declared) > limit:
            await error_response(refusal)(scope, receive, send)
            return
        upload = scope["path"] in UPLOADS
        if upload and self.arriving >= ARRIVING:
            busy = ApiError(429, "queue_full", f"{ARRIVING} uploads are in work already; try again later", retry_after=1)
            await error_response(busy)(scope, receive, send)
            return
        self.arriving += upload
        started, read, whole = asyncio.get_running_loop().time(), 0, False

        def release() -> None:
            nonlocal upload
            self.arriving -= upload
            upload = False

        async def counted() -> Message:
            nonlocal read, whole
            if whole:  # what comes now is the end of the connection, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(started + ARRIVAL_SECONDS + read / SLOWEST_BYTES_PER_SECOND):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request body came too slowly") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > limit:
                # FastAPI lets an HTTPException out of its body parser; anything else would become a 400.
                raise HTTPException(refusal.status, refusal.message)
            return message

        scope["fluid.release_upload"] = release
        try:
            await self.app(scope, counted, send)
        finally:
            release()


class Guard:
    """Checks the API key and counts the request against its client's rate, before anything of the body is read."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, limiter: RateLimiter):
        self.app, self.authenticator, self.limiter = app, authenticator, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        address = scope["client"][0] if scope.get("client") else "unknown"
        try:
            client = self.authenticator.client(authorization, address)
            self.limiter.take(client)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        scope["fluid.client"] = client
        await self.app(scope, receive, send)


class RequestCounter:
    """Counts and times answers by route template and status."""

    def __init__(self, app: ASGIApp, metrics: ServingMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # stays when the client left before the answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - started)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def install_error_handlers(app: FastAPI) -> None:
    """Every error leaves as OpenAI's error object."""

    async def api_error(_: Request, error: Any) -> JSONResponse:
        return error_response(error)

    async def invalid(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return error_response(ApiError(400, first["type"], message, where or None))

    async def http_error(_: Request, error: Any) -> JSONResponse:
        response = error_response(ApiError(error.status_code, "http_error", str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return error_response(
            ApiError(500, "internal_error", "the server failed on this request; its log says why", retry_after=1)
        )

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
