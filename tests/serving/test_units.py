"""Parts of the server that need no server: keys, limits, safety, provenance, the ledger, batch lines."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from PIL import Image
from serving_support import small_recipe
from tiny_fluid import tiny_pipeline

from fluid_core.config import ServingConfig
from fluid_core.data.storage import LocalStorage, open_storage
from fluid_core.registry.models import resolve_model
from fluid_core.serving import keys
from fluid_core.serving.batch_rows import LineError, parse_body, parse_envelope
from fluid_core.serving.edits import EditForm
from fluid_core.serving.errors import ApiError
from fluid_core.serving.generator import Generator
from fluid_core.serving.http import ARRIVING, JSON_BYTES, BodyLimit, install_error_handlers
from fluid_core.serving.keys import Authenticator, RateLimiter, load_keys, new_key
from fluid_core.serving.ledger import JobLedger, json_line, plan_lines, read_chunk
from fluid_core.serving.offline import make_chunk
from fluid_core.serving.provenance import png_bytes, read_provenance
from fluid_core.serving.requests import ServedModel
from fluid_core.serving.safety import BlockList, load_safety_hook
from fluid_core.serving.schema import BatchBody, GenerationBody, ModelInfo
from fluid_core.serving.tasks import ImageTask


def test_keys_are_kept_as_hashes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ann, bob = new_key("ann", path), new_key("bob", path)
    assert ann not in path.read_text() and path.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="already"):
        new_key("ann", path)
    authenticator = Authenticator(load_keys(path))
    assert authenticator.client(f"Bearer {ann}", "x") == "key:ann"
    assert authenticator.client(f"bearer {bob}", "x") == "key:bob"
    for wrong in (None, "", "Bearer ", f"Bearer {ann}x", f"Basic {ann}", ann):
        with pytest.raises(ApiError) as caught:
            authenticator.client(wrong, "x")
        assert caught.value.status == 401
    before = path.read_text()
    for name in ("", "a b", "a:b", "a\n", "#ann"):
        with pytest.raises(ValueError, match="key name"):
            new_key(name, path)
    assert path.read_text() == before
    (tmp_path / "plain").write_text(f"ann:{ann}\n")
    with pytest.raises(ValueError, match="never the key itself"):
        load_keys(tmp_path / "plain")
    with pytest.raises(ValueError, match="--new-key"):
        load_keys(tmp_path / "absent")


def test_rate_limit_is_a_bucket_for_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    limiter = RateLimiter(6)
    for _ in range(6):
        limiter.take("ann")
    with pytest.raises(ApiError) as caught:
        limiter.take("ann")
    assert caught.value.status == 429 and caught.value.headers()["Retry-After"] == "10"
    limiter.take("bob")
    now[0] = 10.5
    limiter.take("ann")
    with pytest.raises(ApiError):
        limiter.take("ann")


def test_the_block_list_sees_through_case_accents_and_spacing(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("# a comment\nbad thing\nÜbel\n")
    hook = load_safety_hook(None, str(tmp_path / "words"))
    assert hook.check_prompt("a BAD   thing!", None) and hook.check_prompt("so ubel", None)
    assert hook.check_prompt("a badthing", None) is None and hook.check_prompt("a red circle", None) is None
    assert BlockList([]).check_prompt("bad thing", None) is None
    assert isinstance(load_safety_hook("fluid_core.serving.safety:BlockList", None), BlockList)
    with pytest.raises(ValueError, match="write package"):
        load_safety_hook("fluid_core.nothing:here", None)
    with pytest.raises(ValueError, match="no effect beside"):
        ServingConfig(safety_hook="a:b", blocked_words_file="words")


def test_provenance_is_in_the_png_and_its_bytes_are_deterministic() -> None:
    details = {"prompt": "ein roter Kreis ○", "seed": 1, "model": "unit:3", "licence": "Apache-2.0"}
    image = Image.new("RGB", (8, 8), "red")
    data = png_bytes(image, details)
    assert data == png_bytes(image, dict(reversed(details.items())))
    opened = Image.open(io.BytesIO(data))
    assert read_provenance(opened) == details and opened.info["fluid:prompt"] == details["prompt"]
    assert read_provenance(Image.open(io.BytesIO(png_bytes(image)))) is None


def test_the_ledger_commits_a_chunk_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("1\n\n2\n3\n4\n\n5")
    with open(path, "rb") as file:
        plan = plan_lines(file, 2, {})
    assert plan.rows == 5 and plan.chunks == 3 and [plan.rows_of(c) for c in range(3)] == [2, 2, 1]
    assert [read_chunk(path, plan, c) for c in range(3)] == [[b"1", b"2"], [b"3", b"4"], [b"5"]]
    ledger = JobLedger(open_storage(str(tmp_path / "job")), "batches/x")
    assert ledger.write_plan(plan) == plan
    other = plan.model_copy(update={"rows": 9})
    assert ledger.write_plan(other) == plan
    assert ledger.commit(1, b"one\n", b"", 1, 0, 0.1, "m") and not ledger.commit(1, b"two\n", b"", 1, 0, 0.1, "m")
    assert ledger.commit(0, b"zero\n", b"bad\n", 1, 1, 0.1, "m")
    assert list(ledger.results("output", ledger.committed().values())) == [b"zero\n", b"one\n"]
    next((tmp_path / "job/batches/x/output").glob("000000-*.jsonl")).write_bytes(b"zer\n")
    with pytest.raises(ValueError, match=r"000000-\w+\.jsonl is missing or damaged: delete .*_ledger/000000.json"):
        list(ledger.results("output", ledger.committed().values()))
    with open(tmp_path / "empty", "wb+") as file, pytest.raises(ValueError, match="no lines"):
        plan_lines(file, 2, {})


def test_two_gateways_that_commit_the_same_chunk_leave_one_result_that_can_be_read(tmp_path: Path) -> None:
    """At a takeover: the second has looked for an entry and found none when the first writes its own, with other times in it."""
    first = JobLedger(open_storage(str(tmp_path)))

    class Overtaken(LocalStorage):
        def size_or_none(self, name: str) -> int | None:
            found = super().size_or_none(name)
            assert first.commit(0, b"created 1\n", b"refused 1\n", 1, 1, 0.1, "m")
            return found

    assert not JobLedger(Overtaken(str(tmp_path))).commit(0, b"created 2\n", b"refused 2\n", 1, 1, 0.1, "m")
    records = first.committed().values()
    assert list(first.results("output", records)) == [b"created 1\n"]
    assert list(first.results("errors", records)) == [b"refused 1\n"]


def test_batch_lines() -> None:
    assert parse_envelope(b'{"prompt": "x"}', 4, plain=True) == ("4", {"prompt": "x"})
    assert parse_envelope(b'{"custom_id": "a", "body": {"prompt": "x"}}', 4, plain=True) == ("a", {"prompt": "x"})
    for line, code in (
        (b"[]", "invalid_json_line"),
        (b'{"custom_id": "a", "body": {}, "more": 1}', "unknown_field"),
        (b'{"custom_id": 7, "body": {}}', "missing_required_parameter"),
        (b'{"prompt": "x"}', "unknown_field"),
        (rb'{"custom_id": "\ud800", "body": {"prompt": "x"}}', "invalid_json_line"),
        (b"[" * 200_000, "invalid_json_line"),
    ):
        with pytest.raises(LineError) as caught:
            parse_envelope(line, 1, plain=False)
        assert caught.value.code == code
    first, again, other = (parse_body({"prompt": "x"}, job, 3).seed for job in ("a", "a", "b"))
    assert first == again != other
    with pytest.raises(ApiError):
        parse_body({"prompt": "x", "stream": True}, "a", 1)
    assert json.loads(parse_body({"prompt": "x", "seed": 5}, "a", 1).model_dump_json())["seed"] == 5


def test_an_offline_job_keeps_unreadable_lines_apart(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "bundle")
    recipe = small_recipe(tmp_path, model=str(tmp_path / "bundle"))
    served = ServedModel(resolve_model(recipe.serving.model, recipe.registry), recipe)
    lines = [rb'{"prompt": "x", "\ud800": 1}', b'{"prompt": "a red circle", "steps": 1}', b"[" * 200_000]
    good, bad = make_chunk(served, BlockList(), recipe, open_storage(str(tmp_path / "out")), 0, 0, lines, "job")
    assert [row["line"] for row in good] == [2]
    assert [(row["line"], row["error"]["code"]) for row in bad] == [(1, "invalid_json_line"), (3, "invalid_json_line")]
    assert len([json_line(row) for row in good + bad]) == 3


@pytest.mark.parametrize("released", [False, True])
def test_uploads_in_work_are_bounded(released: bool) -> None:
    """Each holds its body in memory: beyond the bound they are refused until others are answered or have let go of it."""
    answering, statuses = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        if released:
            scope["fluid.release_upload"]()
        await answering.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(limited: BodyLimit) -> None:
        messages = iter([{"type": "http.request", "body": b"x", "more_body": more} for more in (True, False)])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await limited({"type": "http", "path": "/v1/images/edits", "headers": []}, receive, send)

    async def run() -> None:
        limited = BodyLimit(app, 100, 100)
        asked = [asyncio.create_task(ask(limited)) for _ in range(ARRIVING + 1)]
        await asyncio.sleep(0)
        assert statuses == ([] if released else [429])
        answering.set()
        await asyncio.gather(*asked, ask(limited))
        assert statuses.count(200) == (ARRIVING + 2 if released else ARRIVING + 1) and limited.arriving == 0

    asyncio.run(run())


def test_bodies_that_are_large_or_slow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluid_core.serving.http.ARRIVAL_SECONDS", 0.1)
    app = FastAPI()
    install_error_handlers(app)
    limits: list[BodyLimit] = []

    @app.post("/{path:path}")
    async def take(request: Request) -> int:
        return len(await request.body())

    def limit(app: Any) -> BodyLimit:
        limits.append(BodyLimit(app, 2 * JSON_BYTES, 3 * JSON_BYTES))
        return limits[0]

    app.add_middleware(limit)

    async def arriving(*parts: tuple[float, int]) -> AsyncIterator[bytes]:
        for pause, size in parts:
            await asyncio.sleep(pause)
            yield b"x" * size

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

            async def status(path: str, content: Any) -> tuple[int, str]:
                answer = await client.post(path, content=content)
                return answer.status_code, answer.text

            for path, size in (("/v1/batches", 1), ("/v1/images/edits", 2), ("/v1/files", 3)):
                most = size * JSON_BYTES
                assert await status(path, b"x" * most) == (200, str(most))
                assert (await status(path, b"x" * (most + 1)))[0] == 413
                assert (await status(path, arriving((0, most), (0, 1))))[0] == 413
            slow, text = await status("/v1/files", arriving((0, 1), (0.5, 1)))
            assert slow == 408 and "too slowly" in json.loads(text)["error"]["message"] and limits[0].arriving == 0
            assert (await status("/v1/files", arriving((0, 100_000), (0.5, 1))))[0] == 200

    asyncio.run(run())


def edit_of(image: Image.Image, mask: Image.Image | None = None, **save: Any) -> tuple[np.ndarray, np.ndarray]:
    """(the image, its mask) as an edit would work with them, from uploaded PNGs."""

    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **save)
        return buffer.getvalue()

    info = ModelInfo(id="unit", created=0, image_size="2x1", size_multiple=1, grid=[1, 2], max_prompt_tokens=8, defaults={})
    form = EditForm(GenerationBody(prompt="x"), png(image), None if mask is None else png(mask))
    task = form.apply(ImageTask("x", 1, seed=0), info, ServingConfig())
    return tuple(np.asarray(Image.open(io.BytesIO(data or b""))) for data in (task.image, task.mask))  # type: ignore[return-value]


def test_grayscale_of_16_bits_is_scaled() -> None:
    """Pillow clips what is above 255 to white: a dark image would come out white, a black mask would mark everything."""
    deep = Image.fromarray(np.array([[0x8000, 300]], np.uint16))
    image, mask = edit_of(deep, deep)
    assert image.tolist() == [[[128] * 3, [1] * 3]] and mask.tolist() == [[255, 0]]
    _, mask = edit_of(deep, transparency=300)
    assert mask.tolist() == [[0, 255]], "the value that the file calls transparent is made anew"


def test_the_metadata_of_a_batch_has_openais_limits() -> None:
    asked = {"input_file_id": "file-a", "endpoint": "/v1/images/generations", "completion_window": "24h"}
    BatchBody.model_validate(asked | {"metadata": {f"{i:064}": "v" * 512 for i in range(16)}})
    for wrong in ({"k" * 65: "v"}, {"k": "v" * 513}, {str(i): "v" for i in range(17)}):
        with pytest.raises(ValueError, match="metadata"):
            BatchBody.model_validate(asked | {"metadata": wrong})


class RefusesSecondImages(BlockList):
    """A hook of a deployment's own: it sees finished images, and lets one pass."""

    seen = 0

    def check_image(self, image: Image.Image, prompt: str, user: str | None) -> str | None:
        RefusesSecondImages.seen += 1
        assert image.size == (32, 32) and (prompt, user) == ("a red circle", "ann")
        return "not this one" if RefusesSecondImages.seen == 2 else None


def test_an_image_that_the_hook_refuses_is_not_sent(tmp_path: Path) -> None:
    RefusesSecondImages.seen = 0
    tiny_pipeline(tmp_path / "made").save_pretrained(tmp_path / "bundle")
    hook = f"{__name__}:RefusesSecondImages"
    recipe = small_recipe(tmp_path, model=str(tmp_path / "bundle"), safety_hook=hook)
    events = asyncio.run(
        Generator(recipe.model_dump(mode="json")).generate(ImageTask("a red circle", 3, seed=0, user="ann"), 60.0)
    )
    assert [event.kind for event in events] == ["started", "image", "error"]
    assert events[-1].details is not None and events[-1].details["code"] == "content_policy_violation"
    assert events[-1].details["status"] == 400 and "not this one" in events[-1].details["message"]
