"""Pages in headless Chromium, over its DevTools protocol: sizes, pictures and complaints."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip
MOST_BYTES = 256 << 20
STARTS_WITHIN_SECONDS = 60


@dataclass(frozen=True)
class Visit:
    """`width`: of all that the page draws, CSS pixels, which the viewport should hold; `complaints`: of the browser."""

    width: float
    height: float
    complaints: list[str]
    frame_seconds: list[float]
    """Between frames while the page was scrolled to its end; none unless asked for."""


class Tab:
    """The DevTools protocol of one tab: `ask` a method, `events` that came meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return (await self._until(lambda answer: answer.get("id") == number))["result"]

    async def wait_for(self, method: str) -> None:
        if not any(event["method"] == method for event in self.events):
            await self._until(lambda answer: answer.get("method") == method)

    async def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            answer = await self._socket.receive_json(timeout=120)
            if "method" in answer:
                self.events.append(answer)
            if wanted(answer):
                assert "error" not in answer, answer
                return answer


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """The address of a browser that lives in the with block, with an empty profile in `folder`; skips without one."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium (Debian's package of that name)")
    profile = folder / "profile"
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        place, deadline = profile / "DevToolsActivePort", time.monotonic() + STARTS_WITHIN_SECONDS
        while not (place.exists() and place.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{place.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        process.wait(30)


def visit(
    browser: str,
    page: Path,
    *,
    width: int,
    height: int = 900,
    dark: bool = False,
    opened: bool = False,
    scroll: bool = False,
    picture: Path | None = None,
    whole: bool = True,
) -> Visit:
    """Opens a file in a viewport of that size; `opened`: with every <details> open.

    `picture`: a PNG of the page, of the `whole` or of its first screen.
    """

    async def work(tab: Tab) -> Visit:
        for domain in ("Page", "Log", "Runtime"):
            await tab.ask(f"{domain}.enable")
        await tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=width < 600,
                      deviceScaleFactor=2 if width < 600 else 1)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await tab.ask("Emulation.setEmulatedMedia", features=[scheme])
        await tab.ask("Page.navigate", url=page.resolve().as_uri())
        await tab.wait_for("Page.loadEventFired")
        if opened:
            await _run(tab, "document.querySelectorAll('details').forEach(each => each.open = true)")
        frames = await _run(tab, SCROLLED) if scroll else []
        metrics = await tab.ask("Page.getLayoutMetrics")
        size = metrics["cssContentSize"]
        if picture is not None:
            area = {"x": 0, "y": 0, "width": width, "height": size["height"] if whole else height, "scale": 1}
            shot = await tab.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=area)
            picture.write_bytes(base64.b64decode(shot["data"]))
        entries = [event["params"]["entry"] for event in tab.events if event["method"] == "Log.entryAdded"]
        return Visit(size["width"], size["height"], [entry["text"] for entry in entries], frames)

    return asyncio.run(_in_tab(browser, work))


# Scrolls by 40 pixels a frame, and gives the milliseconds between frames.
SCROLLED = """new Promise(done => {
    const end = document.scrollingElement.scrollHeight - innerHeight, times = [];
    const next = now => {
        times.push(now);
        scrollBy({top: 40, behavior: 'instant'});
        if (scrollY >= end - 1 || times.length > 1000) done(times.slice(1).map((time, i) => (time - times[i]) / 1000));
        else requestAnimationFrame(next);
    };
    requestAnimationFrame(next);
})"""


async def _run(tab: Tab, script: str) -> Any:
    found = await tab.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")


async def _in_tab(browser: str, work: Callable[[Tab], Coroutine[Any, Any, Visit]]) -> Visit:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{browser}/json/new?about:blank") as answer:
            address = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=MOST_BYTES) as socket:
            return await work(Tab(socket))
