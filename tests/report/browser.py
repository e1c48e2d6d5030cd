"""A headless Chromium, driven over two pipes by its DevTools protocol, without a driver or another package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ANSWER_SECONDS = 30.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


def require_chromium() -> str:
    """Return the path of Chromium. If there is none, skip the test; in CI fail it."""
    path = next(filter(None, map(shutil.which, NAMES)), "")
    if not path:
        why = "no Chromium here (apt-get install chromium; tests/run.sh does so in CI)"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return path


class Browser:
    """One page of the browser; `events` are the messages that it sent about the page, oldest first."""

    def __init__(self, width: int = 1200, height: int = 1000) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        arguments = [require_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += ["--remote-debugging-pipe", "--no-first-run", "--disable-background-networking", "--mute-audio"]
        arguments += [f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}", "about:blank"]
        # the browser reads commands from descriptor 3 and writes answers to 4
        shell = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *arguments], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)
        self.profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return the browser's answer."""
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.write_end, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_SECONDS
        while (message := self._message(deadline)).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser says nothing for {ANSWER_SECONDS} s"
            read = os.read(self.read_end, 1 << 20)
            assert read, "the browser is gone"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Load a page and wait until it is complete."""
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Return the value of an expression that the page evaluates."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = ANSWER_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, f"not within {seconds} s: {expression}"
            time.sleep(0.05)

    def press(self, key: str, shift: bool = False) -> None:
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Home": 36, "Enter": 13}
        event = {"key": key, "modifiers": 8 if shift else 0, "windowsVirtualKeyCode": codes.get(key, 0)}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **event)

    def mouse(self, event_type: str, x: float, y: float, **more: Any) -> None:
        self.ask("Input.dispatchMouseEvent", type=event_type, x=x, y=y, **more)

    def colours(self, scheme: str) -> None:
        """Emulate the reader's system preference, 'light' or 'dark'."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Return the exceptions, and the messages of the console and of the browser itself."""
        methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in methods]

    @property
    def requests(self) -> list[str]:
        """Return the requested URLs, the page's own included."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]
