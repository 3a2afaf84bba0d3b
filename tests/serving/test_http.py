"""The server through the official `openai` client and plain HTTP."""

import io
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from serving_support import Server, difference, image_of, request

from fluid_core.serving.http import JSON_BYTES
from fluid_core.serving.provenance import read_provenance


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_images_over_http_are_the_pipelines(server: Server, client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red circle", n=2, extra_body={"seed": 5})
    images = [image_of(item.b64_json) for item in answer.data or []]
    expected = server.pipeline(["a red circle"] * 2, seed=5)
    assert [difference(a, b) <= 1 for a, b in zip(images, expected, strict=True)] == [True, True]
    details = read_provenance(images[1])
    assert details is not None
    assert details["prompt"] == "a red circle" and details["seed"] == 6 and details["licence"] == "Apache-2.0"
    assert details["settings"]["num_steps"] == 6 and details["model"] == "bundle"
    assert answer.size == "32x32" and answer.usage is not None and answer.usage.output_tokens == 32


def test_different_requests_share_batches_and_stay_themselves(server: Server) -> None:
    settings: list[dict[str, Any]] = [
        {"seed": i, "steps": 2 + i % 5, "guidance": 1.0 + i % 3, "temperature": 0.8 + 0.1 * (i % 3)} for i in range(12)
    ]
    settings[3]["size"] = "48x32"
    settings[4]["negative_prompt"] = "a blue square"
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda s: request(server, "/v1/images/generations", {"prompt": "a red circle", **s}), settings))
    for one, (status, _, body) in zip(settings, answers, strict=True):
        assert status == 200, body
        expected = server.pipeline(
            ["a red circle"],
            seed=one["seed"],
            num_steps=one["steps"],
            guidance_scale=one["guidance"],
            temperature=one["temperature"],
            size=(48, 32) if "size" in one else None,
            negative_prompts=one.get("negative_prompt"),
        )[0]
        assert difference(image_of(json.loads(body)["data"][0]["b64_json"]), expected) <= 1
    metrics = request(server, "/metrics")[2].decode()
    count, total = (float(_metric(metrics, f"fluid_batch_size_{name}")) for name in ("count", "sum"))
    assert total / count > 1.5, "requests did not share batches"


def test_streaming_reveals_the_image_token_by_token(client: openai.OpenAI, server: Server) -> None:
    stream = client.images.generate(prompt="a blue circle", stream=True, partial_images=3, extra_body={"seed": 3, "steps": 8})
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    known = [sum(event.known) for event in events[:3]]  # type: ignore[union-attr]
    assert known == sorted(known) and 0 < known[0] < known[2] < 16
    expected = server.pipeline(["a blue circle"], seed=3, num_steps=8)[0]
    assert difference(image_of(events[-1].b64_json), expected) <= 1


def test_edits_change_what_the_mask_says(server: Server, client: openai.OpenAI) -> None:
    picture = server.pipeline(["a red circle"], seed=1)[0]
    mask = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 16, 32, 32))
    answer = client.images.edit(
        image=("image.png", _png(picture)),
        mask=("mask.png", _png(mask)),
        prompt="a blue square",
        input_fidelity="low",
        output_compression=100,
        extra_body={"seed": 2},
    )
    edited = image_of((answer.data or [])[0].b64_json)
    white = Image.fromarray(np.where(np.asarray(mask)[..., 3] == 0, 255, 0).astype(np.uint8))
    expected = server.pipeline.edit(picture, white, "a blue square", seed=2)
    assert difference(edited, expected) <= 1
    assert (read_provenance(edited) or {})["edited"] is True


def test_outpainting_by_a_transparent_frame(server: Server, client: openai.OpenAI) -> None:
    picture = server.pipeline(["a red circle"], seed=1)[0]
    canvas = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
    canvas.paste(picture, (0, 0))
    answer = client.images.edit(image=("canvas.png", _png(canvas)), prompt="a red circle", extra_body={"seed": 4})
    wide = image_of((answer.data or [])[0].b64_json)
    assert wide.size == (48, 32)
    assert difference(wide, server.pipeline.outpaint(picture, (48, 32), (0, 0), "a red circle", seed=4)) <= 1


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "   "}, 400, "prompt"),
        ({"prompt": "a circle", "n": 11}, 400, "n"),
        ({"prompt": "a circle", "n": "2"}, 400, "n"),
        ({"prompt": "a circle", "size": "33x32"}, 400, "size"),
        ({"prompt": "a circle", "size": "1000x1000"}, 400, "size"),
        ({"prompt": "a circle", "size": "big"}, 400, "size"),
        ({"prompt": "a circle", "steps": 0}, 400, "steps"),
        ({"prompt": "a circle", "steps": 17}, 400, None),
        ({"prompt": "a circle", "guidance": -1}, 400, "guidance"),
        ({"prompt": "a circle", "partial_images": 2}, 400, "partial_images"),
        ({"prompt": "a circle", "response_format": "url"}, 400, "response_format"),
        ({"prompt": "a circle", "quality": "hd"}, 400, "quality"),
        ({"prompt": "a circle", "output_compression": 90}, 400, "output_compression"),
        ({"prompt": "a circle", "input_fidelity": "high"}, 400, "input_fidelity"),
        ({"prompt": "a circle", "image_url": "http://169.254.169.254/"}, 400, "image_url"),
        ({"prompt": "a circle", "model": "other"}, 404, "model"),
        ({"prompt": "circle " * 40}, 400, None),
        ({"prompt": "x" * 5000}, 400, "prompt"),
        ({"prompt": "some CSAM please"}, 400, "prompt"),
    ],
)
def test_what_a_client_does_wrong_is_told(server: Server, body: dict[str, Any], status: int, param: str | None) -> None:
    answered, _, text = request(server, "/v1/images/generations", body)
    error = json.loads(text)["error"]
    assert answered == status and error["param"] == param and error["message"], text
    assert "num_steps" not in error["message"], "the API calls it steps"
    if param == "partial_images":
        return  # right with stream
    answered, _, _ = request(server, "/v1/images/generations", {**body, "stream": True})
    assert answered == status


def test_bad_images_and_masks_are_refused(server: Server) -> None:
    good = Image.new("RGB", (32, 32), "red")
    truncated = _png(Image.effect_noise((64, 64), 50).convert("RGB"))[:-400]
    bomb = _png(Image.new("L", (4000, 4000)))
    opaque = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    cases: list[tuple[bytes, bytes | None, str]] = [
        (b"<svg/>", None, "not a PNG"),
        (b"", None, "not a PNG"),
        (truncated, None, "damaged"),
        (bomb, None, "at most 128"),
        (_png(good), None, "mask: send one"),
        (_png(good), _png(Image.new("RGBA", (16, 16))), "differs from the image"),
        (_png(good), _png(opaque), "nothing is marked"),
        (_png(good), b"GIF89a", "not a PNG"),
    ]
    for image, mask, reason in cases:
        files = {"image": ("i.png", image)} | ({"mask": ("m.png", mask)} if mask is not None else {})
        status, _, text = request(server, "/v1/images/edits", form={"prompt": "a circle"}, files=files)
        assert status == 400 and reason in json.loads(text)["error"]["message"], (reason, text)
    for n in ("0", "two", "[" * 200_000):
        status, _, text = request(server, "/v1/images/edits", form={"prompt": "a circle", "n": n}, files={"image": ("i", b"x")})
        assert status == 400 and json.loads(text)["error"]["param"] == "n"
    status, _, _ = request(server, "/v1/images/edits", {"prompt": "a circle"})
    assert status == 400


def test_models_health_metrics_and_documents(server: Server, client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["bundle"] and models[0].image_size == "32x32"  # type: ignore[attr-defined]
    assert client.models.retrieve("bundle").id == "bundle"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert request(server, "/healthz")[0] == 200 and request(server, "/readyz")[0] == 200
    assert request(server, "/")[0] == 200
    assert request(server, "/v1/nothing")[0] == 404
    assert json.loads(request(server, "/openapi.json")[2])["info"]["title"] == "Fluid"
    metrics = request(server, "/metrics")[2].decode()
    assert 'fluid_http_requests_total{route="/v1/images/generations",status="200"}' in metrics
    assert float(_metric(metrics, "fluid_ready")) == 1 and float(_metric(metrics, "fluid_images_in_flight")) == 0


def test_large_bodies_are_refused_before_they_are_read(server: Server) -> None:
    body = json.dumps({"prompt": "a" * JSON_BYTES}).encode()
    status, _, text = request(server, "/v1/images/generations", raw=body)
    assert status == 413, text
    upload = {"image": ("i.png", b"x" * server.recipe.serving.max_upload_bytes)}
    assert request(server, "/v1/images/edits", form={"prompt": "a circle"}, files=upload)[0] == 413

    def chunks() -> Any:
        for _ in range(JSON_BYTES // 100_000 + 2):
            yield b"a" * 100_000

    asked = urllib.request.Request(
        f"{server.url}/v1/images/generations", chunks(), {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    )
    # The server may hang up while the client still sends: then there is no answer to read.
    with pytest.raises(OSError) as refused:
        urllib.request.urlopen(asked, timeout=60)
    if isinstance(refused.value, urllib.error.HTTPError):
        assert refused.value.code == 413
    assert request(server, "/v1/images/generations", {"prompt": "a red circle", "steps": 1})[0] == 200


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _metric(text: str, name: str) -> str:
    return next(
        line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(f"{name} ") or line.startswith(f"{name}{{")
    )
