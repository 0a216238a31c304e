# SPDX-License-Identifier: Apache-2.0
"""A headless browser, by the DevTools protocol over a pair of pipes."""

import base64
import contextlib
import itertools
import json
import os
import select
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SECONDS = 30.0


class PageError(Exception):
    """The page has raised an exception, or the browser has refused a command."""


class Browser:
    """A browser with one page. `events` has what the page has told since the last command that was sent."""

    def __init__(self, program: Path, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self._write, self._read = ours[1], theirs[0]
        # Chromium reads commands from descriptor 3, and answers at 4.
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(ours[0]), str(theirs[1]), str(program), *flags],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        with contextlib.suppress(PageError, OSError):
            self.send("Browser.close")
        os.close(self._write)
        os.close(self._read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for found in self._messages():
            if found.get("id") == number:
                if "error" in found:
                    raise PageError(found["error"]["message"])
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)
        raise PageError(f"no answer to {method}")

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + _SECONDS
        while (left := deadline - time.monotonic()) > 0:
            while b"\0" in self._rest:
                message, _, self._rest = self._rest.partition(b"\0")
                yield json.loads(message)
            if select.select([self._read], [], [], left)[0]:
                piece = os.read(self._read, 1 << 16)
                if not piece:
                    raise PageError("the browser has ended")
                self._rest += piece

    def open(self, url: str) -> None:
        """Open an address, in a page that holds nothing of the one before."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)

    def evaluate(self, program: str) -> Any:
        """Return the value of an expression in the page, awaited."""
        found = self.send(
            "Runtime.evaluate", expression=program, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise PageError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def wait(self, program: str, seconds: float = _SECONDS) -> None:
        """Wait until an expression in the page is true."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(PageError):  # while a page is loaded
                if self.evaluate(f"Boolean({program})"):
                    return
            if time.monotonic() > deadline:
                raise PageError(f"never true: {program}; {self.evaluate('document.body.innerText')}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse, as a person does."""
        quoted = json.dumps(selector)
        self.wait(f"document.querySelector({quoted})")
        self.evaluate(f"document.querySelector({quoted}).scrollIntoView({{block: 'center'}})")
        box = self.evaluate(
            f"(() => {{ const r = document.querySelector({quoted}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
