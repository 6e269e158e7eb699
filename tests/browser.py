"""A headless Chromium driven by its DevTools protocol over 127.0.0.1: pages are used as a person would."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START_S = 60.0
ANSWER_S = 60.0
_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-port=0", "--window-size=1100,900"),
    # no name resolves: a page that asks for anything outside gets nothing
    *("--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"),
)
T = TypeVar("T")


class Browser:
    """One page; downloads land in `downloads`. What the page keeps is in `profile`."""

    def __init__(self, profile: Path, downloads: Path) -> None:
        assert CHROMIUM is not None
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        self.requests: list[str] = []  # addresses that pages asked for
        downloads.mkdir(parents=True, exist_ok=True)
        port = profile / "DevToolsActivePort"
        port.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [CHROMIUM, f"--user-data-dir={profile}", *_QUIET],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._run(self._connect(port))
            self.call("Page.enable")
            self.call("Network.enable")
            self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, path: Path) -> None:
        """Load a file and wait until its scripts have run."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for(f"location.href === {json.dumps(path.as_uri())} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        end = time.monotonic() + ANSWER_S
        while not self.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def key(self, key: str, *, control: bool = False) -> None:
        """Press and let go of a key, say "1", "j", "Escape"."""
        modifiers = 2 if control else 0
        text = {"text": key} if len(key) == 1 and not control else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=modifiers, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def type(self, text: str) -> None:
        """Put a text where the cursor is, as an input method does."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._run(self._call(method, params))

    def close(self) -> None:
        """End the browser in order, so that its profile is whole; then by force."""
        if hasattr(self, "_session"):
            try:
                self.call("Browser.close")
            except (AssertionError, aiohttp.ClientError, ConnectionError):
                self._process.terminate()  # it was gone before it could answer
            self._run(self._session.close())
        else:
            self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._loop.close()

    def _run(self, doing: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(doing, START_S + ANSWER_S))

    async def _connect(self, port: Path) -> None:
        end = time.monotonic() + START_S
        while not (port.is_file() and port.read_text().count("\n")):
            assert self._process.poll() is None, "Chromium ended at once"
            assert time.monotonic() < end, "Chromium did not start"
            await asyncio.sleep(0.05)
        number = port.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{number}/json") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        address = pages[0]["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive()
            assert message.type == aiohttp.WSMsgType.TEXT, f"{method}: the browser is gone"
            told = json.loads(message.data)
            if told.get("method") == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                answer: dict[str, Any] = told["result"]
                return answer
