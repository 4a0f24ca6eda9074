"""A page in a headless Chromium: what it shows, says on its console and loads, and what a pointer and keys do.

The browser is spoken to through two named pipes, in the protocol of its developer tools.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

from tests import processes

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = f"there is no browser: none of {', '.join(NAMES)} is installed"
LIMIT = 60.0  # seconds for the browser's whole life
ANSWER = 20.0  # seconds for one answer


class Browser:
    """One tab.

    Attributes:
        complaints: errors and warnings on the page's console, uncaught errors, and what the page's policy has refused.
        loaded: addresses of everything that was requested.
    """

    def __init__(self, to: int, back: int) -> None:
        self.complaints: list[str] = []
        self.loaded: list[str] = []
        self._to, self._back, self._buffer = to, back, b""
        self._numbers, self._events = itertools.count(1), set()
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def open(
        self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, script: bool = True
    ) -> None:
        """Load a file and wait until it is there."""
        self.complaints.clear()
        self.loaded.clear()
        self._events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        self.ask("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, height: int = 1500) -> np.ndarray:
        """The upper part of the page, (height, width, channels), 0 to 1."""
        return imread(io.BytesIO(self.picture(height)))

    def picture(self, height: int | None = None) -> bytes:
        """The page, or its upper part, as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=clip)
        return base64.b64decode(answer["data"])

    def pointer(self, kind: str, x: float, y: float, *, clicks: int = 0) -> None:
        """Move, press or release the left button of the mouse at a place in the window."""
        names = {"move": "mouseMoved", "press": "mousePressed", "release": "mouseReleased"}
        pressed = {"buttons": 1, "button": "left"} if kind != "move" or clicks else {}
        self.ask("Input.dispatchMouseEvent", type=names[kind], x=x, y=y, clickCount=clicks, **pressed)

    def key(self, name: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + ANSWER
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser did not answer within {ANSWER:g} s"
            self._buffer += os.read(self._back, 1 << 20)
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        self._events.add(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.loaded.append(parameters["request"]["url"])


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that ends with the block.

    Args:
        folder: for its profile and the pipes.
    """
    assert PROGRAM, MISSING
    pipes = [folder / "to", folder / "back"]
    for pipe in pipes:
        os.mkfifo(pipe)
    handles = [os.open(pipe, os.O_RDWR) for pipe in pipes]
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
        "--mute-audio",
    )
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [
        "sh",
        "-c",
        'exec 3<"$1" 4>"$2"; shift 2; exec "$@"',
        "sh",
        *pipes,
        PROGRAM,
        *flags,
        profile,
        "about:blank",
    ]
    try:
        with processes.started(command, limit=LIMIT):
            yield Browser(*handles)
    finally:
        for handle in handles:
            os.close(handle)
