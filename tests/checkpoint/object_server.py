"""moto's S3 server on the loopback interface, with faults on request."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

Fault = Callable[[int, str, str], str | None]
"""Called with the number of a request, its method and its path; returns what happens to it.

None: it is answered. slow_down: 503 before it is done. lost: it is done, and the reply is lost. cut: a part of its body
is read, and the connection closed. down: the connection is closed.
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_REGION": "us-east-1"}
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class ObjectServer:
    """A server with one bucket, `bucket`. `requests` has the method and path of each request so far."""

    def __init__(self) -> None:
        import moto.server

        self._app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)
        self.fault: Fault = lambda number, method, path: None
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}"}

    def keys(self) -> list[str]:
        """The keys of all objects, read from moto's memory: not a request."""
        from moto.s3.models import s3_backends

        buckets = s3_backends["123456789012"]["aws"].buckets
        return sorted(buckets["bucket"].keys) if "bucket" in buckets else []

    def reset(self) -> None:
        """Empty the bucket."""
        from moto.s3.models import s3_backends

        s3_backends.reset()
        s3_backends["123456789012"]["aws"].create_bucket("bucket", "us-east-1")
        self.fault = lambda number, method, path: None
        self.requests.clear()

    def start(self) -> None:
        self._thread.start()
        self.reset()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append((method, path))
            fault = self.fault(len(self.requests), method, path)
        if fault == "slow_down":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Connection", "close")])
            return [_SLOW_DOWN]
        if fault == "cut":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        if fault in ("cut", "down"):
            return self._close(environ)
        answer: Iterable[bytes] = self._app(environ, start_response)
        if fault == "lost":
            list(answer)
            return self._close(environ)
        return answer

    def _close(self, environ: dict[str, Any]) -> Iterable[bytes]:
        """Close the connection without a reply: HTTP/1.1 keeps it open otherwise."""
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError


@contextmanager
def running() -> Iterator[ObjectServer]:
    """A server whose address and credentials are in the environment of this process."""
    server = ObjectServer()
    server.start()
    before = dict(os.environ)
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def by_chance(seed: int, share: float, kinds: tuple[str, ...]) -> Fault:
    """Faults of these kinds in a share of the requests."""
    draw = random.Random(seed)
    return lambda number, method, path: draw.choice(kinds) if draw.random() < share else None
