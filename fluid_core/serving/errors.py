"""What a client is told when a request is not answered with images: OpenAI's error body, our reasons."""

from dataclasses import dataclass
from typing import Any


@dataclass
class ApiError(Exception):
    """An HTTP error. `retry_after` (seconds) marks what may be asked again unchanged."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error" if self.status == 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param)


def model_not_found(wanted: str, served: str) -> ApiError:
    return ApiError(404, "model_not_found", f"model {wanted!r} is not served here; this server has {served!r}", "model")


def overloaded(retry_after: float) -> ApiError:
    return ApiError(429, "overloaded", "the server's queue is full; try again later", retry_after=retry_after)


def deadline_exceeded(seconds: float) -> ApiError:
    return ApiError(504, "deadline_exceeded", f"the images were not finished within {seconds:g} s", retry_after=1)


def replica_lost() -> ApiError:
    return ApiError(503, "replica_lost", "the replica that made the images went away, twice; send the request again", None, 1)


def unavailable(message: str) -> ApiError:
    return ApiError(503, "unavailable", message, retry_after=5)
