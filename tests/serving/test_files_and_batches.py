"""Files and batches through the official client."""

import json
import time
from typing import Any

import openai
import pytest
from openai.types import Batch
from serving_support import Server, difference, image_of, request


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/images/generations", "body": body}


def start(client: openai.OpenAI, lines: list[Any]) -> Batch:
    data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    endpoint: Any = "/v1/images/generations"
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"who": "me"})


def finished(client: openai.OpenAI, batch: Batch) -> Batch:
    until = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    return batch


def test_a_batch_from_upload_to_images(server: Server, client: openai.OpenAI) -> None:
    lines = [line(f"item-{i}", prompt="a red circle", seed=i, steps=2) for i in range(20)]
    lines[3] = line("wrong", prompt="a red circle", steps=0)
    lines[4] = line("refused", prompt="csam")
    lines[5] = line("two", prompt="two square", n=2)
    batch = finished(client, start(client, [*lines[:10], "", *lines[10:]]))
    assert batch.status == "completed" and batch.metadata == {"who": "me"}
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (20, 18, 2)
    rows = [json.loads(row) for row in client.files.content(batch.output_file_id or "").text.splitlines()]
    assert [row["custom_id"] for row in rows] == [one["custom_id"] for i, one in enumerate(lines) if i not in (3, 4)]
    assert len(rows[3]["response"]["body"]["data"]) == 2
    image = image_of(rows[-1]["response"]["body"]["data"][0]["b64_json"])
    assert difference(image, server.pipeline(["a red circle"], seed=19, num_steps=2)[0]) <= 1
    errors = [json.loads(row) for row in client.files.content(batch.error_file_id or "").text.splitlines()]
    assert {row["custom_id"]: row["response"]["status_code"] for row in errors} == {"wrong": 400, "refused": 400}
    assert batch.id in [other.id for other in client.batches.list(limit=1)]


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([line("a", prompt="x"), "{not json"], "invalid_json_line", 2),
        ([line("a", prompt="x"), line("a", prompt="y")], "duplicate_custom_id", 2),
        ([{"custom_id": "a", "method": "POST", "url": "/v1/chat", "body": {}}], "invalid_url", 1),
        ([{"method": "POST", "url": "/v1/images/generations", "body": {}}], "missing_required_parameter", 1),
        ([""], "empty_file", None),
    ],
)
def test_a_file_that_is_no_batch_fails_whole(client: openai.OpenAI, lines: list[Any], code: str, number: int | None) -> None:
    batch = finished(client, start(client, lines))
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)


def test_cancel_keeps_what_was_finished(client: openai.OpenAI) -> None:
    batch = start(client, [line(str(i), prompt="a red circle", steps=16) for i in range(400)])
    while not (batch.request_counts and batch.request_counts.completed >= 32):
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
        assert batch.status in ("validating", "in_progress")
    assert batch.estimate["remaining_seconds"] > 0  # type: ignore[attr-defined]
    client.batches.cancel(batch.id)
    batch = finished(client, batch)
    assert batch.status == "cancelled" and batch.request_counts is not None
    kept = client.files.content(batch.output_file_id or "").text.splitlines() if batch.output_file_id else []
    assert len(kept) == batch.request_counts.completed < 400
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.batches.cancel(batch.id)


def test_files(server: Server, client: openai.OpenAI) -> None:
    file = client.files.create(file=("../../etc/passwd", b"{}\n"), purpose="batch")
    assert file.filename == "passwd" and file.bytes == 3
    assert file.id in [one.id for one in client.files.list()]
    assert client.files.retrieve(file.id).id == file.id
    assert client.files.content(file.id).content == b"{}\n"
    assert client.files.delete(file.id).deleted
    for wrong in (file.id, "file-..", "..%2F..%2Fetc%2Fpasswd", "file-" + "a" * 99):
        assert request(server, f"/v1/files/{wrong}")[0] == 404
        assert request(server, f"/v1/files/{wrong}/content")[0] == 404
    with pytest.raises(openai.NotFoundError):
        start_with(client, "file-absent")
    assert request(server, "/v1/files", form={"purpose": "other"}, files={"file": ("f", b"x")})[0] == 400


def start_with(client: openai.OpenAI, file_id: str) -> Batch:
    endpoint: Any = "/v1/images/generations"
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h")
