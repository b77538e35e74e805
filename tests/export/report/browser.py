"""A headless Chromium, driven over a pipe by its own protocol: nothing but the browser is needed."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

_NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
_PATIENCE_SECONDS = 120.0
SIZES_OF_PICTURES = (
    "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
)
"""Expression for `Browser.value`: width and height of each picture of the page, as drawn."""


def find_browser() -> str:
    """The browser's path, from SPARSEPASS_BROWSER or by name; skips the test where there is none."""
    named = os.environ.get("SPARSEPASS_BROWSER")
    found = shutil.which(named) if named else next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            "no Chromium here: install one (apt-get install chromium-headless-shell), or name its binary in SPARSEPASS_BROWSER"
        )
    return found


@contextlib.contextmanager
def browser() -> Iterator["Browser"]:
    """A browser with one blank page, in a process of its own that ends with the block."""
    binary = find_browser()
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads commands from file descriptor 3 and writes to 4.
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
        )
        shell = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        process = subprocess.Popen(
            ["bash", "-c", shell, binary, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Browser(read_answers, write_commands).attach()
        finally:
            process.kill()
            process.wait()
            os.close(read_answers)
            os.close(write_commands)


class Browser:
    """One page of a browser. Final.

    Attributes:
        messages: What the page logged, exceptions that nobody caught, and what the browser held against it.
        requests: Addresses that it asked for.
    """

    def __init__(self, answers: int, commands: int) -> None:
        self._answers, self._commands, self._rest = answers, commands, b""
        self._count, self._session = 0, ""
        self._events: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.requests: list[str] = []

    def attach(self) -> Self:
        """Open a page and listen to it."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return what it answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(self._commands, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._count:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])

    def open(self, page: Path, *, width: int = 1200, scheme: str = "light", script: bool = True, media: str = "") -> None:
        """Load a file and wait until it is there.

        Args:
            page: The file.
            width: Of the window.
            scheme: ``light`` or ``dark``.
            script: Whether scripts run.
            media: ``print``, or empty for the screen.
        """
        self.messages.clear()
        self.requests.clear()
        self._events.clear()
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        mobile = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page; works with the page's own scripts switched off, too."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found}"
        return found["result"].get("value")

    def picture(self, place: Path) -> None:
        """Save the whole page as a PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        place.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"the browser said nothing for {_PATIENCE_SECONDS:g} s"
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        self._note(found)
        return found

    def _note(self, found: dict[str, Any]) -> None:
        method, about = found.get("method"), found.get("params", {})
        if method is None:
            return
        self._events.append(found)
        if method == "Runtime.consoleAPICalled":
            self.messages.append(f"console.{about['type']}: {[part.get('value') for part in about['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.messages.append(f"exception: {about['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.messages.append(f"{about['entry']['level']}: {about['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
