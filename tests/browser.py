"""A headless Chromium for tests of pages, spoken to over its own DevTools protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The browser, or None where there is none."""

_WORDS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
_PATIENCE = 600  # seconds; a test machine may be busy with a hundred other tests


class Browser:
    """One browser with one page, and everything that the page said and asked for.

    Args:
        profile: An empty folder for what a browser writes.
    """

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.events: list[dict[str, Any]] = []
        self._number = 0

    def __enter__(self) -> Browser:
        from websockets.sync.client import connect

        assert CHROMIUM is not None
        self.process = subprocess.Popen(
            [CHROMIUM, *_WORDS, f"--user-data-dir={self.profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        # the browser chooses a free port and says which
        address = next(
            found.group(1)
            for line in self.process.stderr
            if (found := re.search(r"DevTools listening on (ws://\S+)", line))
        )
        with ExitStack() as stack:
            self.socket = stack.enter_context(
                connect(address, max_size=None, open_timeout=_PATIENCE, ping_interval=None)
            )
            self._stack = stack.pop_all()
        self.session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.process.terminate()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process.wait()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its answer; what the browser tells meanwhile is kept in ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self.socket.send(json.dumps(message if self.session is None else {**message, "sessionId": self.session}))
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                answer: dict[str, Any] = told["result"]
                return answer

    def wait_for(self, event: str, **wanted: Any) -> dict[str, Any]:
        """Return the parameters of the next event of that name, among those kept or yet to come."""
        seen = 0
        while True:
            for told in self.events[seen:]:
                if told["method"] == event and wanted.items() <= told["params"].items():
                    self.events.remove(told)
                    params: dict[str, Any] = told["params"]
                    return params
            seen = len(self.events)
            self._next()

    def _next(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.socket.recv(timeout=_PATIENCE))
        if "method" in told:
            self.events.append(told)
        return told

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Load a page from the disk."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.absolute().as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key: ``Tab``, ``Enter``."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def download(self, script: str, folder: Path) -> str:
        """Run a script that starts a download, and return the text that came."""
        session, self.session = self.session, None
        self.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        self.session = session
        self.run(script)
        self.wait_for("Browser.downloadProgress", state="completed")
        (file,) = folder.iterdir()
        return file.read_bytes().decode()

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[str]:
        """Everything that would be red in the browser's console."""
        found = []
        for told in self.events:
            params = told["params"]
            if told["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            if told["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            if told["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Every address that was asked for and is not written in the page itself."""
        asked = [t["params"]["request"]["url"] for t in self.events if t["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(("data:", "about:"))]
