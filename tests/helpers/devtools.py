"""Chromium without a window, asked by its DevTools protocol: a page is opened, and scripts in it say what it shows."""

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
PATIENCE_S = 60.0


class Browser:
    """One Chromium, and the address of its protocol."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def read(self, url: str, script: str) -> Any:
        """What an expression in JavaScript comes to in a page, as soon as it is neither null nor an error."""
        return asyncio.run(self._read(url, script))

    async def _read(self, url: str, script: str) -> Any:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._endpoint, max_msg_size=0) as socket:
            target = await _ask(socket, "Target.createTarget", url=url)
            page = await _ask(socket, "Target.attachToTarget", targetId=target["targetId"], flatten=True)
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end:
                answer = await _ask(
                    socket,
                    "Runtime.evaluate",
                    page["sessionId"],
                    expression=script,
                    returnByValue=True,
                    awaitPromise=True,
                )
                if "exceptionDetails" not in answer and answer["result"].get("value") is not None:
                    return answer["result"]["value"]
                await asyncio.sleep(0.2)
            raise AssertionError(f"{url}: {script} is nothing after {PATIENCE_S:.0f} s, {answer}")


async def _ask(socket: aiohttp.ClientWebSocketResponse, method: str, session: str | None = None, **given: Any) -> Any:
    message = {"id": 1, "method": method, "params": given}
    await socket.send_json(message | ({"sessionId": session} if session else {}))
    while (answer := await socket.receive_json(timeout=PATIENCE_S)).get("id") != 1:
        pass  # events
    assert "error" not in answer, answer
    return answer["result"]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the body."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--window-size=1400,1600",
    ]
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen([*command, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log)
    try:
        yield Browser(waited_for(profile.parent / "chromium.log", r"DevTools listening on (ws://\S+)", process))
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def waited_for(log: Path, pattern: str, process: subprocess.Popen) -> str:
    """The first group of a pattern as soon as it stands in what a process writes."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found.group(1)
        time.sleep(0.1)
    raise AssertionError(f"{pattern} is not in what it wrote: {log.read_text(errors='replace')}")
