"""Servers on the loopback interface that take notifications: HTTP and SMTP, one thread each."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass
class Post:
    path: str
    body: dict[str, Any]
    headers: dict[str, str]


class HttpServer:
    """Takes POSTs and answers `status`; with `hangs` it never answers."""

    def __init__(self, status: int = 200, hangs: bool = False) -> None:
        self.posts: list[Post] = []
        self._release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posts.append(Post(self.path, json.loads(body), dict(self.headers)))
                if hangs:
                    outer._release.wait(60)
                    return
                self.send_response(status)
                if status // 100 == 3:
                    self.send_header("Location", f"{outer.url}/elsewhere")
                self.end_headers()
                self.wfile.write(b"no\x1b[31m" if status >= 400 else b"ok")

            def do_GET(self) -> None:
                outer.posts.append(Post(self.path, {}, {}))

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Mail:
    sender: str
    to: list[str]
    message: EmailMessage


class SmtpServer:
    """As much of SMTP (RFC 5321) as smtplib asks for, with AUTH PLAIN."""

    def __init__(self) -> None:
        self.mails: list[Mail] = []
        self.logins: list[str] = []
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self._say("220 here")
                sender, to = "", []
                while line := self.rfile.readline().decode().strip():
                    verb = line.upper()
                    if verb.startswith("EHLO"):
                        self._say("250-here\r\n250 AUTH PLAIN")
                    elif verb.startswith("AUTH PLAIN"):
                        outer.logins.append(line.split()[2])
                        self._say("235 fine")
                    elif verb.startswith("MAIL FROM:"):
                        sender = line[10:].split()[0].strip("<>")
                        self._say("250 fine")
                    elif verb.startswith("RCPT TO:"):
                        to.append(line[8:].strip("<>"))
                        self._say("250 fine")
                    elif verb == "DATA":
                        self._say("354 go on")
                        outer.mails.append(Mail(sender, to, message_from_bytes(self._data(), policy=policy.default)))  # type: ignore[arg-type]
                        self._say("250 taken")
                    elif verb == "QUIT":
                        self._say("221 bye")
                        return
                    else:
                        self._say("250 fine")

            def _data(self) -> bytes:
                lines: list[bytes] = []
                while (line := self.rfile.readline()) not in (b".\r\n", b""):
                    lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
                return b"".join(lines)

            def _say(self, line: str) -> None:
                self.wfile.write(f"{line}\r\n".encode())

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> SmtpServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def closed_port() -> int:
    """A port of the loopback interface on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
