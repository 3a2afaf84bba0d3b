"""A headless Chromium driven over its DevTools protocol: real clicks, drags, touches and the accessibility tree.

The protocol is JSON over a websocket; `websockets` is all that it takes.
"""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Page:
    """One tab. `problems` collects what the page's scripts threw and what the browser holds against the page.

    An answer of 400 or more, which the browser logs too, is no problem of the page.
    """

    def __init__(self, socket: ClientConnection):
        self._socket = socket
        self._ids = itertools.count(1)
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A protocol command. Raises AssertionError with the browser's reason."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] == "Runtime.exceptionThrown":
            details = event["params"]["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event["method"] == "Log.entryAdded":
            entry = event["params"]["entry"]
            if entry["level"] == "error" and entry["source"] != "network":
                self.problems.append(entry["text"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The first true value of an expression."""
        until = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < until, (
                f"{expression} did not come true; the page: {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def goto(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """(left, top, width, height) of an element in the viewport, after scrolling it there."""
        return tuple(
            self.evaluate(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
                "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
            )
        )

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        self.drag(selector, [(0.5, 0.5)])

    def drag(self, selector: str, path: list[tuple[float, float]], touch: bool = False) -> None:
        """Press, move along `path` and release; points are shares of the element's width and height."""
        left, top, width, height = self.box(selector)
        points = [{"x": left + x * width, "y": top + y * height} for x, y in path]
        if touch:
            for kind, at in [("touchStart", points[0]), *(("touchMove", point) for point in points[1:])]:
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[at])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        held: dict[str, Any] = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **points[0])
        self.call("Input.dispatchMouseEvent", type="mousePressed", **points[0], **held)
        for point in points[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", **point, **held)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **points[-1], **held)

    def fill(self, selector: str, text: str) -> None:
        """Type into a field in place of what is in it."""
        self.evaluate(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select(); }})()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.evaluate("document.execCommand('delete')")

    def paste(self, selector: str) -> str:
        """What a field holds after Ctrl-V in place of what was in it."""
        self.fill(selector, "")
        self.call("Input.dispatchKeyEvent", type="keyDown", key="v", code="KeyV", modifiers=2, commands=["paste"])
        self.call("Input.dispatchKeyEvent", type="keyUp", key="v", code="KeyV", modifiers=2)
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).value")

    def phone(self, width: int = 390, height: int = 844) -> None:
        """A small screen with touch instead of a mouse."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)

    def controls(self) -> list[tuple[str, str]]:
        """(role, accessible name) of everything that can be operated, and of every picture."""
        roles = ("button", "textbox", "spinbutton", "combobox", "img", "image", "progressbar", "link", "list")
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles
        ]

    def screenshot(self, path: Path) -> None:
        """The whole page, as a PNG file."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


class Chromium:
    """A running browser with a profile of its own."""

    def __init__(self, port: int):
        self._address = f"http://127.0.0.1:{port}"

    @contextmanager
    def page(self, width: int = 1280, height: int = 900) -> Iterator[Page]:
        """A new tab with nothing in it."""
        target = self._ask("/json/new?about:blank", "PUT")
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            page = Page(socket)
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            yield page
        self._ask(f"/json/close/{target['id']}", "GET")

    def _ask(self, path: str, method: str) -> Any:
        request = urllib.request.Request(self._address + path, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text.startswith(b"{") else None


@contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """Start the browser; `folder` becomes its profile."""
    assert CHROMIUM is not None
    # No sandbox: CI runs in containers, often as root, where Chromium's own does not start.
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"]
    process = subprocess.Popen(
        [CHROMIUM, *options, "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        announced = folder / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (announced.is_file() and "\n" in announced.read_text()):
            assert process.poll() is None and time.monotonic() < until, "chromium did not start"
            time.sleep(0.05)
        yield Chromium(int(announced.read_text().splitlines()[0]))
    finally:
        process.terminate()
        process.wait(timeout=30)
