"""A faulty W&B server: it refuses every request, or accepts it and never answers."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("refuses", "silent")
_REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@contextmanager
def bad_server(kind: str) -> Iterator[str]:
    """Run a faulty server in threads of this process, and yield its URL. `kind` is one of `KINDS`."""
    stopped = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if kind == "silent":
                stopped.wait()
                return
            self.request.recv(65536)
            self.request.sendall(_REFUSAL)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Ignore clients that have given up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            stopped.set()
            server.shutdown()
            thread.join()
