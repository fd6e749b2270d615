"""Headless Chromium over its DevTools protocol: open a page, ask the DOM, move the pointer, take pictures."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ANSWER_S = 60


class Tab:
    """One page, and every complaint of the browser about it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: object) -> dict:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while (message := await self._socket.receive_json(timeout=ANSWER_S)).get("id") != number:
            if message["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(str(message["params"]))
        assert "error" not in message, message
        return message["result"]

    async def open(self, page: Path, width: int, height: int) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.call("Page.navigate", url=page.as_uri())
        while await self.ask("document.readyState") != "complete" or page.name not in await self.ask("location.href"):
            await asyncio.sleep(0.05)

    async def ask(self, expression: str) -> object:
        """The value of a JavaScript expression, which the page's own policy does not hinder."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def point_at(self, selector: str) -> None:
        """Move the pointer to the middle of an element, which is scrolled into view."""
        await self.ask(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = await self.ask(f"{box}.x + {box}.width / 2"), await self.ask(f"{box}.y + {box}.height / 2")
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def dark(self) -> None:
        """As a reader who prefers dark pages."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    async def picture(self, file: Path) -> None:
        data = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(data["data"]))


@asynccontextmanager
async def opened(page: Path, profile: Path, *, width: int = 1300, height: int = 1600) -> AsyncIterator[Tab]:
    """``page`` in a browser of its own; the test is skipped where none is installed."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    process = await asyncio.create_subprocess_exec(
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(ANSWER_S):
            while not port_file.is_file() or not port_file.read_text().strip():
                assert process.returncode is None, "the browser ended at once"
                await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(item for item in await answer.json() if item["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.open(page, width, height)
                yield tab
    finally:
        process.kill()
        await process.wait()
