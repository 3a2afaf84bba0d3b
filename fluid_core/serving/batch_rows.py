"""Lines of a batch file: OpenAI's `{"custom_id", "method", "url", "body"}`, or just the body's fields (with `custom_id`)."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fluid_core.serving.errors import ApiError
from fluid_core.serving.schema import GenerationBody

ENDPOINT = "/v1/images/generations"
_ENVELOPE = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class BatchRow:
    custom_id: str
    body: GenerationBody


class LineError(ValueError):
    """The line is not a batch request at all."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def parse_envelope(line: bytes, number: int, plain: bool) -> tuple[str, dict[str, Any]]:
    """(custom_id, body). `plain` allows lines that are the body itself; their id is the line's number by default.

    Raises:
        LineError: not JSON (or nested too deeply, or no valid Unicode), not an object, or its custom_id, method or url is wrong.
    """
    try:
        value = json.loads(line)
        # JSON can write half of a surrogate pair ("\ud800"): no text that an answer or a file could repeat.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_json_line", "not a JSON object")
    custom_id: Any
    body: Any
    if plain and "body" not in value:
        custom_id = value.pop("custom_id", str(number))
        body = value
    else:
        custom_id, body = value.get("custom_id"), value.get("body")
        if set(value) - _ENVELOPE:
            raise LineError("unknown_field", f"unknown field {sorted(set(value) - _ENVELOPE)[0]!r}")
        if value.get("method", "POST") != "POST" or value.get("url", ENDPOINT) != ENDPOINT:
            raise LineError("invalid_url", f"method must be POST and url {ENDPOINT}")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 256:
        raise LineError("missing_required_parameter", "custom_id must be a text of 1 to 256 characters")
    if not isinstance(body, dict):
        raise LineError("missing_required_parameter", "body must be an object")
    return custom_id, body


def parse_body(body: dict[str, Any], job: str, number: int) -> GenerationBody:
    """The request of a line. Without a seed it gets one from the job and the line, so that a repeat makes the same image.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        parsed = GenerationBody.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, first["type"], f"{where}: {first['msg']}", where) from None
    if parsed.stream:
        raise ApiError(400, "invalid_value", "stream: a batch does not stream", "stream")
    if parsed.seed is None:
        digest = hashlib.sha256(f"{job}:{number}".encode()).digest()
        parsed.seed = int.from_bytes(digest[:4], "big")
    return parsed
