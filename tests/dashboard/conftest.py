"""A dashboard in a process of its own, as a person starts it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment


@dataclass
class Dashboard:
    """A dashboard that runs."""

    process: subprocess.Popen[str]
    printed: str
    url: str
    cookie: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(re.findall(r":(\d+)/", self.url)[0])

    @property
    def token(self) -> str:
        return self.url.partition("token=")[2]

    def request(
        self, method: str, path: str, body: Any = None, **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request with the headers of a page of the dashboard, but for those given."""
        sent: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}", "Cookie": self.cookie}
        if method == "POST":
            sent |= {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
            for name, value in {**sent, "Content-Length": str(len(data))}.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(data)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def enter(self) -> None:
        """Exchange the token for the cookie."""
        status, headers, _ = self.request("GET", f"/?token={self.token}")
        assert status == 200
        self.cookie = headers["Set-Cookie"].partition(";")[0]

    def get(self, path: str) -> Any:
        status, _, body = self.request("GET", path)
        assert status == 200, (status, body)
        return json.loads(body)

    def rows(self) -> dict[str, Any]:
        """The answer with all rows, once all of them were read."""
        while (answer := self.get("/api/rows"))["unread"] or not answer["rows"]:
            pass
        return dict(answer)

    def curves(self, **body: Any) -> dict[str, Any]:
        """What the page decodes: the header, with each curve's columns as lists."""
        status, _, data = self.request("POST", "/api/curves", body)
        assert status == 200, (status, data)
        (length,) = struct.unpack_from("<I", data)
        header: dict[str, Any] = json.loads(data[4 : 4 + length])
        for curve, columns in zip(header["curves"], header.get("columns", []), strict=False):
            for name, (start, count) in columns.items():
                curve[name] = list(struct.unpack_from(f"<{count}d", data, 4 + length + 8 * start))
        return header


@contextlib.contextmanager
def running(*arguments: str, cache: Path, **environment: str) -> Iterator[Dashboard]:
    """Start `trainer dashboard`, and end it with Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "dashboard", *arguments, "--port", "0"],
        env={**clean_environment(), "XDG_CACHE_HOME": str(cache), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        printed = "".join(process.stdout.readline() for _ in range(4))
        (url,) = re.findall(r"http://\S+", printed)
        dashboard = Dashboard(process, printed, url)
        dashboard.enter()
        yield dashboard
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(300)
            raise
        finally:
            process.stdout.close()
    assert code == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of the module."""
    return tmp_path_factory.mktemp("dashboard") / "runs"
