"""A headless Chromium, driven over its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/ has the methods and events.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp

TIMEOUT_S = 60.0
"""Longest wait for anything; a browser that starts on a busy machine takes many seconds."""

_FLAGS = (
    "--headless",
    "--no-sandbox",  # it does not start for root otherwise; it sees only pages of the tests
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-address=127.0.0.1",
    "--remote-debugging-port=0",
)


class PageError(AssertionError):
    """The page is not as expected."""


def find() -> str | None:
    """Return the program, or None where it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One tab. Methods are called one after the other, as there is one reader."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last_id = 0
        self._seen: list[str] = []
        self.problems: list[str] = []

    async def open(self, url: str) -> None:
        """Load a page."""
        self._seen.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(TIMEOUT_S):
            while "Page.loadEventFired" not in self._seen:
                await self._receive()

    async def evaluate(self, script: str) -> Any:
        """Return the value of an expression, of a promise when it is there.

        Raises:
            PageError: it throws.
        """
        found = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise PageError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    async def text(self, selector: str) -> str:
        """Return what a reader sees of an element."""
        script = f"document.querySelector({json.dumps(selector)}).innerText"
        return cast("str", await self.evaluate(script))

    async def wait_until(self, condition: str) -> None:
        """Wait until an expression is true; it is looked at whenever the page changes.

        Raises:
            PageError: it does not become true.
        """
        script = f"""new Promise((resolve) => {{
          const observer = new MutationObserver(() => check());
          const check = () => {{ if ({condition}) {{ observer.disconnect(); resolve(); }} }};
          observer.observe(document, {{
            subtree: true, childList: true, attributes: true, characterData: true }});
          check();
        }})"""
        try:
            await self.evaluate(script)
        except TimeoutError:
            raise PageError(f"{condition} did not become true") from None

    async def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Change the size of the window in pixels, and what the user prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self) -> bytes:
        """Return the whole page as a PNG."""
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result.

        Raises:
            PageError: it fails.
            TimeoutError: it takes too long.
        """
        self._last_id += 1
        await self._socket.send_json({"id": self._last_id, "method": method, "params": params})
        async with asyncio.timeout(TIMEOUT_S):
            while (message := await self._receive()).get("id") != self._last_id:
                pass
        if "error" in message:
            raise PageError(f"{method}: {message['error']}")
        return cast("dict[str, Any]", message["result"])

    async def _receive(self) -> dict[str, Any]:
        message = cast("dict[str, Any]", await self._socket.receive_json())
        match message.get("method"):
            case None:
                pass
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
            case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                self.problems.append(message["params"]["entry"]["text"])
            case event:
                self._seen.append(event)
        return message


@contextlib.asynccontextmanager
async def opened(program: str, profile: Path) -> AsyncIterator[Page]:
    """Run a browser with one empty tab.

    Args:
        program: path of Chromium.
        profile: a new folder for whatever it keeps.

    Raises:
        PageError: it does not start.
    """
    process = await asyncio.create_subprocess_exec(
        program,
        *_FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    drained = None
    try:
        port = await _port_of(process.stderr)
        drained = asyncio.create_task(process.stderr.read())  # or it would wait for a reader
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/json/list") as response:
                (tab,) = [one for one in await response.json() if one["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        if drained is not None:
            await drained


async def _port_of(stderr: asyncio.StreamReader) -> int:
    """Read what the browser says until it has told its port."""
    said = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TIMEOUT_S):
            async for line in stderr:
                said += line
                if line.startswith(b"DevTools listening on ws://127.0.0.1:"):
                    return int(line.split(b":")[2].split(b"/")[0])
    raise PageError(f"chromium does not start: {said.decode(errors='replace')[-500:]}")
