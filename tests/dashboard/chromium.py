"""Headless Chromium, driven through its DevTools protocol over a websocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run "
    "--disable-extensions --disable-background-networking --disable-component-update --disable-sync --mute-audio "
    "--no-default-browser-check --remote-debugging-port=0 --remote-allow-origins=*"
)
_WAIT_S = 120.0


class Page:
    """A page of the browser. Every method waits for its answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket = loop, socket
        self._number = 0
        self.requests: list[str] = []
        """URL of every request of the page so far."""
        self.messages: list[str] = []
        """Errors and warnings of the console, and uncaught exceptions."""

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        return self._loop.run_until_complete(self._command(method, parameters))

    async def _command(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await asyncio.wait_for(self._socket.receive_json(), _WAIT_S)
            if answer.get("id") == self._number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    return {"result": {"value": None}}  # the page is being left
                assert "error" not in answer, (method, answer["error"])
                return dict(answer.get("result", {}))
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.messages.append(str(details.get("exception", {}).get("description", details.get("text"))))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.messages.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.messages.append(str([one.get("value", one.get("description")) for one in parameters["args"]]))

    def open(self, url: str) -> None:
        """Load a page."""
        self.command("Page.navigate", url=url)

    def reload(self) -> None:
        """Load the page again."""
        self.js("window.isOld = true")
        self.command("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """Return the value of an expression, awaited."""
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression: str, timeout_s: float = _WAIT_S) -> Any:
        """Return the value of an expression as soon as it is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.js(f"(() => {{ try {{ return {expression}; }} catch {{ return null; }} }})()")):
            text = "document.body.innerText.slice(0, 2000)"
            assert time.monotonic() < deadline, (expression, self.messages, self.js(text))
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """Return what a person reads in the first element of a selector."""
        return str(self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        """Return what a person reads in each element of a selector."""
        return list(
            self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText.trim())")
        )

    def key(self, key: str, *, shift: bool = False) -> None:
        """Press a key."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        codes |= {"Home": 36, "End": 35, " ": 32}
        common: dict[str, Any] = {"key": key, "modifiers": 8 if shift else 0}
        common["windowsVirtualKeyCode"] = codes.get(key, ord(key.upper()[0]))
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.command("Input.dispatchKeyEvent", **down, **common)
        self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        for letter in text:
            self.command("Input.insertText", text=letter)

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of an element."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drag over an element, from and to a share of its width."""
        box = self.js(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        y = box[1] + box[3] / 2
        places = [box[0] + box[2] * (start + (end - start) * step / 4) for step in range(5)]
        common: dict[str, Any] = {"y": y, "button": "left", "clickCount": 1}
        self.command("Input.dispatchMouseEvent", type="mousePressed", x=places[0], **common)
        for x in places[1:]:
            self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, buttons=1, **common)
        self.command("Input.dispatchMouseEvent", type="mouseReleased", x=places[-1], **common)

    def _middle(self, selector: str) -> tuple[float, float]:
        place = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'});"
            " const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        return place[0], place[1]

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window and the color scheme of the system."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path) -> None:
        """Write an image of the window."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def accessibility(self) -> list[dict[str, Any]]:
        """Return role, name and properties of each node that a screen reader is given."""
        nodes = self.command("Accessibility.getFullAXTree")["nodes"]
        return [
            {
                "role": node.get("role", {}).get("value"),
                "name": node.get("name", {}).get("value", ""),
                **{one["name"]: one["value"].get("value") for one in node.get("properties", [])},
            }
            for node in nodes
            if not node.get("ignored")
        ]


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """Start the browser with a page and a profile of its own; end it and remove the profile afterwards."""
    assert PROGRAM, "no Chromium"
    profile = Path(tempfile.mkdtemp(prefix="trainer-chromium-"))
    command = [PROGRAM, *_FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    try:
        yield from _page(loop, profile, width, height)
    finally:
        process.terminate()
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(300)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        _retry(lambda: shutil.rmtree(profile))


def _page(loop: asyncio.AbstractEventLoop, profile: Path, width: int, height: int) -> Iterator[Page]:
    port_file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + _WAIT_S
    while not port_file.exists() or not port_file.read_text().strip():
        assert time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.05)
    port = int(port_file.read_text().split()[0])
    session = aiohttp.ClientSession(loop=loop)
    try:
        page = loop.run_until_complete(_attach(loop, session, port))
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            page.command(f"{domain}.enable")
        page.resize(width, height)
        yield page
        loop.run_until_complete(page._socket.close())
    finally:
        loop.run_until_complete(session.close())


async def _attach(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession, port: int) -> Page:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
        (target,) = [one for one in await response.json() if one["type"] == "page"]
    socket = await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=64 << 20)
    return Page(loop, socket)


def _retry(action: Callable[[], None]) -> None:
    """The last processes of Chromium write to the profile while it is removed."""
    for _ in range(50):
        try:
            return action()
        except OSError:
            time.sleep(0.1)
    return action()
