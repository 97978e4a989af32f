"""A headless Chromium for tests of pages, driven over DevTools; where none is installed they are skipped."""

import asyncio
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_START_S, _ANSWER_S = 60.0, 60.0


class Page:
    """One tab. `events` holds what the browser told without being asked: requests, errors of scripts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._ids = loop, socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one request of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), _ANSWER_S))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path) -> None:
        """Loads a file, with everything the page asks for told as events."""
        for domain in ("Network", "Runtime", "Page", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + _ANSWER_S
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < until, f"{path} has not loaded"

    def press(self, key: str, code: int) -> None:
        """A key pressed and let go; `code`: its Windows virtual key code, which is what acts."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def requests(self) -> list[str]:
        """Addresses of everything that was asked for so far."""
        sent = (e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [request["request"]["url"] for request in sent]

    def complaints(self) -> list[dict[str, Any]]:
        """Errors the browser told: of scripts, of the page, of what could not be loaded."""
        return [
            event
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
        ]


@contextmanager
def browser_page(folder: Path) -> Iterator[Page]:
    """A tab of a browser of its own, whose profile lies in `folder`. Skips the test where there is no browser."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(_NAMES)})")
    profile = folder / "profile"
    options = [
        "--headless",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
    ]
    options += ["--no-sandbox"] if os.getuid() == 0 else []  # it does not start as root with one
    process = subprocess.Popen(
        [program, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    loop = asyncio.new_event_loop()
    try:
        port = _port(profile / "DevToolsActivePort", process)
        session, socket = loop.run_until_complete(_connect(port))
        try:
            yield Page(loop, socket)
        finally:
            loop.run_until_complete(session.close())
    finally:
        process.terminate()
        process.wait(30)
        loop.close()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"the browser did not open its port within {_START_S:.0f} s")


async def _connect(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        tabs = await answer.json()
    address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
    return session, await session.ws_connect(address, max_msg_size=0)
