"""The studio page in a real browser against a real server."""

import base64
import itertools
import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium_support import CHROMIUM, Chromium, Page, chromium
from PIL import Image
from serving_support import Relay, Server, difference, image_of, metric, open_request, request

from fluid_core.serving.edits import _filled
from fluid_core.serving.provenance import read_provenance

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")

SHOTS = os.environ.get("FLUID_SCREENSHOTS")  # a folder: keep what the pages looked like


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(browser: Chromium, server: Server) -> Iterator[Page]:
    """The studio, ready; after the test nothing in it may have thrown."""
    with browser.page() as tab:
        tab.goto(f"{server.url}/")
        tab.wait("!document.querySelector('#go').disabled")
        yield tab
        assert tab.problems == []


def make(page: Page, seed: int, steps: int = 8) -> Image.Image:
    """Fill in the form, press Generate, return the finished picture."""
    page.fill("#seed", str(seed))
    page.fill("#steps", str(steps))
    page.click("#go")
    page.wait(f"document.querySelector('#status').textContent.includes('seed {seed}')")
    page.wait("!document.querySelector('#go').disabled")
    return shown(page)


def shown(page: Page) -> Image.Image:
    """The pixels of the picture on the page."""
    return image_of(page.evaluate("document.querySelector('#picture').toDataURL('image/png').split(',')[1]"))


def save(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"studio_{name}.png")


def test_a_picture_is_revealed_token_by_token(page: Page, server: Server) -> None:
    assert page.evaluate("document.querySelector('#model').textContent") == "bundle"
    save(page, "empty")
    # At every new status line: how much of the picture is there.
    page.evaluate(
        """(() => { window.shares = [];
        new MutationObserver(() => {
            const c = document.querySelector('#picture'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let there = 0; for (let i = 3; i < d.length; i += 4) there += d[i] > 0;
            shares.push([document.querySelector('#status').textContent, there / (c.width * c.height)]);
        }).observe(document.querySelector('#status'), { childList: true }); })()"""
    )
    picture = make(page, seed=3, steps=8)
    assert difference(picture, server.pipeline(["a red circle"], seed=3, num_steps=8)[0]) <= 1
    seen = page.evaluate("shares")
    steps = [share for text, share in seen if text.startswith("step ")]
    assert [text for text, _ in seen if text.startswith("step ")] == [f"step {i} of 8" for i in range(1, 8)]
    assert all(a < b for a, b in itertools.pairwise(steps)) and 0 < steps[1] < steps[-1] < 1, seen
    assert seen[-1][0] == "made by bundle, seed 3" and seen[-1][1] == 1
    assert page.evaluate("document.querySelector('#progress').value") == 1
    save(page, "desktop")


def test_the_gallery_keeps_seeds_and_commands(page: Page, server: Server) -> None:
    page.fill("#prompt", "two blue square")
    page.fill("#guidance", "1.5")
    first = make(page, seed=7)
    page.fill("#prompt", "a red circle")
    page.fill("#guidance", "")
    second = make(page, seed=8)
    entries = page.evaluate("[...document.querySelectorAll('#gallery li .words')].map((e) => e.textContent)")
    assert entries == ["a red circle · seed 8", "two blue square · seed 7"]

    page.click("#gallery li:nth-child(2) .copy")
    page.wait("document.querySelector('#gallery li:nth-child(2) .copy').textContent === 'Copied'")
    line = page.evaluate("document.querySelector('#curl').textContent")
    command = shlex.split(line)
    assert command[:2] == ["curl", f"{server.url}/v1/images/generations"]
    body = json.loads(command[command.index("-d") + 1])
    assert body == {"prompt": "two blue square", "seed": 7, "size": "32x32", "steps": 8, "guidance": 1.5}
    _, _, answer = request(server, "/v1/images/generations", body)
    assert difference(image_of(json.loads(answer)["data"][0]["b64_json"]), first) <= 1
    # The first picture is shown again, with the settings that made it.
    assert difference(shown(page), first) == 0 and difference(first, second) > 1
    fields = page.evaluate("['prompt', 'seed', 'steps', 'guidance'].map((id) => document.getElementById(id).value)")
    assert fields == ["two blue square", "7", "8", "1.5"]
    assert page.paste("#prompt") == line
    page.click("#gallery li:nth-child(1) .pick")
    page.wait("document.querySelector('#status').textContent.includes('seed 8')")
    assert difference(shown(page), second) == 0


def finished_edit(page: Page, server: Server) -> tuple[Image.Image, Image.Image]:
    """(the edited picture, its mask with white for what was made anew), after comparing with the pipeline's own edit."""
    page.wait("document.querySelector('#status').textContent.startsWith('edited by bundle')")
    page.wait("!document.querySelector('#go').disabled")
    sent = page.evaluate(
        """Promise.all(['image', 'mask'].map(async (name) => {
            const bytes = new Uint8Array(await current.files[name].arrayBuffer());
            return btoa(String.fromCharCode(...bytes)); }))"""
    )
    image, mask = (image_of(one) for one in sent)
    white = Image.fromarray(np.where(np.asarray(mask)[..., 3] == 0, 255, 0).astype(np.uint8))
    edited = shown(page)
    provenance = read_provenance(image_of(page.evaluate("current.base64"))) or {}
    assert provenance["edited"] is True
    filled = _filled(image.convert("RGBA"))
    expected = server.pipeline.edit(filled, white, provenance["prompt"], seed=provenance["seed"], num_steps=8)
    assert difference(edited, expected) <= 1
    return edited, white


def test_what_is_painted_is_made_anew(page: Page, server: Server) -> None:
    before = make(page, seed=1)
    page.click("#inpaint")
    assert page.evaluate("document.querySelector('#inpaint').getAttribute('aria-pressed')") == "true"
    page.click("#apply")
    assert "paint over" in page.wait("document.querySelector('#error').textContent")
    page.drag("#paint", [(0.1, 0.1), (0.4, 0.1), (0.4, 0.4)])
    page.click("#clear")
    page.drag("#paint", [(0.75, 0.2), (0.75, 0.5), (0.75, 0.8)])
    save(page, "mask")
    page.fill("#prompt", "a blue square")
    # A picture that breaks off half-way costs neither the old picture nor what was painted.
    page.evaluate(
        "window.real = onEvent, window.onEvent = async () => { ink.fillRect(0, 0, 32, 32); throw new Error('cut off'); }"
    )
    page.click("#apply")
    assert page.wait("document.querySelector('#error').textContent") == "cut off"
    assert difference(shown(page), before) == 0
    page.evaluate("window.onEvent = real")
    page.click("#apply")
    edited, white = finished_edit(page, server)
    marked = np.asarray(white) > 0
    assert marked[8:24, 22:26].all() and not marked[:, :16].any(), "the mask is not what was painted"
    assert difference(edited, before) > 1
    assert page.evaluate("document.querySelectorAll('#gallery li').length") == 2
    assert page.evaluate("document.querySelector('#gallery .words').textContent") == "a blue square · seed 1 · edited"

    # Its command names the files that the links beside it save, and gives the same picture.
    command = shlex.split(page.evaluate("document.querySelector('#curl').textContent"))
    assert command[1] == f"{server.url}/v1/images/edits"
    assert [command[i + 1] for i, word in enumerate(command) if word == "-F"] == ["image=@image.png", "mask=@mask.png"]
    form = dict(command[i + 1].split("=", 1) for i, word in enumerate(command) if word == "--form-string")
    saved = page.evaluate(
        """Promise.all([...document.querySelectorAll('#files a')].map(async (a) => [a.download,
            btoa(String.fromCharCode(...new Uint8Array(await (await fetch(a.href)).arrayBuffer())))]))"""
    )
    assert [name for name, _ in saved] == ["fluid-1.png", "image.png", "mask.png"]
    files = {name.removesuffix(".png"): (name, base64.b64decode(data)) for name, data in saved[1:]}
    _, _, answer = request(server, "/v1/images/edits", form=form, files=files)
    assert difference(image_of(json.loads(answer)["data"][0]["b64_json"]), edited) <= 1


def test_outpainting_by_dragging_the_picture_in_its_frame(page: Page, server: Server) -> None:
    make(page, seed=2)
    page.click("#outpaint")
    page.click("#apply")
    assert "drag the picture first" in page.wait("document.querySelector('#error').textContent")
    page.evaluate(
        "(() => { const s = document.querySelector('#size'); s.value = '48x32'; s.dispatchEvent(new Event('change')); })()"
    )
    page.drag("#paint", [(0.5, 0.5), (0.6, 0.5), (0.9, 0.5)])  # 19 pixels from its middle place, 8
    save(page, "outpaint")
    page.click("#apply")
    edited, white = finished_edit(page, server)
    marked = np.asarray(white)[0] > 0
    assert edited.size == (48, 32)
    assert marked[:24].all() and not marked[24:].any(), "the picture did not snap to a token of the frame"
    save(page, "outpainted")


def test_what_the_server_refuses_is_said_on_the_page(page: Page, server: Server) -> None:
    page.fill("#steps", "17")
    page.click("#go")
    assert "16" in page.wait("document.querySelector('#error').textContent")
    assert page.evaluate("document.querySelector('#go').disabled") is False
    save(page, "refused")

    make(page, seed=4)
    page.click("#inpaint")
    page.drag("#paint", [(0.5, 0.2), (0.5, 0.8)])
    full = {"prompt": "a red circle", "size": "128x128", "steps": 256}
    connections = [open_request(server, "/v1/images/generations", full | {"n": n}) for n in (10, 10, 10, 2)]
    try:
        until = time.monotonic() + 60
        while metric(server, "fluid_images_in_flight") < server.recipe.serving.max_queued and time.monotonic() < until:
            time.sleep(0.02)
        page.click("#apply")
        message = page.wait("document.querySelector('#error').textContent")
        assert "try again in" in message, message
    finally:
        for connection in connections:
            connection.close()
    # What was painted is still there: once there is room the same press works.
    until = time.monotonic() + 60
    while metric(server, "fluid_images_in_flight") > 0 and time.monotonic() < until:
        time.sleep(0.05)
    page.click("#apply")
    finished_edit(page, server)
    assert page.evaluate("document.querySelector('#error').textContent") == ""


def test_a_server_that_is_away_is_said_on_the_page(browser: Chromium, server: Server) -> None:
    with Relay(server.url) as relay, browser.page() as page:
        page.goto(f"{relay.url}/")
        page.wait("!document.querySelector('#go').disabled")
        picture = make(page, seed=5)
        relay.cut()
        page.click("#go")
        assert "does not answer" in page.wait("document.querySelector('#error').textContent")
        relay.mend()
        assert difference(make(page, seed=5), picture) == 0
        assert page.evaluate("document.querySelector('#error').textContent") == ""

        # In the middle of a picture.
        slow(page)
        assert shown(page).size == (128, 128)
        relay.cut()
        assert "broke" in page.wait("document.querySelector('#error').textContent")
        relay.mend()
        assert difference(shown(page), picture) == 0, "half a picture is left where the whole one was"
        page.fill("#steps", "8")
        page.click("#go")
        page.wait("document.querySelector('#status').textContent.startsWith('made')")
        assert page.problems == []


def slow(page: Page) -> None:
    """Begin a picture that takes long, and wait until it is on its way."""
    page.evaluate("document.querySelector('#size').append(new Option('128 × 128', '128x128', true, true))")
    page.fill("#steps", "256")
    page.click("#go")
    page.wait("document.querySelector('#status').textContent.startsWith('step ')")


def test_stop_frees_the_servers_place(page: Page, server: Server) -> None:
    slow(page)
    page.click("#stop")
    page.wait("document.querySelector('#status').textContent === 'stopped'")
    until = time.monotonic() + 30
    while metric(server, "fluid_images_in_flight") and time.monotonic() < until:
        time.sleep(0.05)
    assert metric(server, "fluid_images_in_flight") == 0


def visible(selector: str) -> str:
    """JavaScript: the element is on the screen, whole."""
    return f"(({{ top, bottom }}) => top > -1 && bottom < innerHeight + 1)(document.querySelector('{selector}').getBoundingClientRect())"


def test_on_a_phone_with_a_finger(browser: Chromium, server: Server) -> None:
    with browser.page() as page:
        page.phone()
        page.goto(f"{server.url}/")
        page.wait("!document.querySelector('#go').disabled")
        page.fill("#prompt", "a red circle on the left of two blue square")
        page.fill("#steps", "17")
        page.click("#go")
        page.wait("document.querySelector('#error').textContent")
        assert page.evaluate(visible("#error")), "the error is off the screen"
        make(page, seed=6)
        assert page.evaluate(visible("#frame")), "the picture is off the screen"
        page.click("#inpaint")
        page.drag("#paint", [(0.3, 0.2), (0.3, 0.5), (0.3, 0.8)], touch=True)
        page.click("#apply")
        finished_edit(page, server)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page scrolls sideways"
        small = page.evaluate(
            "[...document.querySelectorAll('button')].filter((b) => b.getBoundingClientRect().height < 35).map((b) => b.textContent)"
        )
        assert small == [], "too small for a finger"
        save(page, "phone")
        assert page.problems == []


def test_everything_has_a_name(page: Page) -> None:
    make(page, seed=9)
    page.click("#inpaint")
    controls = page.controls()
    assert [role for role, name in controls if not name.strip()] == [], controls
    roles = [role for role, _ in controls]
    assert roles.count("button") >= 9 and "combobox" in roles and roles.count("spinbutton") == 3
    assert ("textbox", "What should be in the picture?") in controls
    labels = [name for role, name in controls if role == "button"]
    assert len(labels) == len(set(labels)), "two buttons of one name"


FAINT = """(() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = (colour) => {
        const [r, g, b] = numbers(colour).map((v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (e) => {
        while (numbers(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement;
        return getComputedStyle(e).backgroundColor;
    };
    const words = (e) => e.matches("input, textarea, select") || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const shown = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.disabled && words(e));
    const contrast = (e) => {
        const [less, more] = [getComputedStyle(e).color, behind(e)].map(luminance).sort((a, b) => a - b);
        return (more + 0.05) / (less + 0.05);
    };
    return [shown.length, luminance(behind(document.body)), shown.filter((e) => contrast(e) < 4.5).map((e) => e.outerHTML)];
})()"""
"""JavaScript: how many elements have words, how light the page is, and which words are too faint (WCAG AA: under 4.5 to 1)."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_can_be_read(page: Page, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    make(page, seed=9)
    page.click("#inpaint")
    page.drag("#paint", [(0.5, 0.2), (0.5, 0.8)])
    page.fill("#steps", "17")
    page.click("#go")
    page.wait("document.querySelector('#error').textContent")
    save(page, scheme)
    elements, light, faint = page.evaluate(FAINT)
    assert elements > 20 and faint == []
    assert (light > 0.5) == (scheme == "light")
