"""Start the server on the loopback interface, and end it on Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from trainer.core.errors import EnvironmentFault
from trainer.core.paths import cache_root
from trainer.dashboard.catalogue import Catalogue
from trainer.dashboard.curves import Curves
from trainer.dashboard.guard import Guard
from trainer.dashboard.server import Server

HOST = "127.0.0.1"
DEFAULT_PORT = 8787


def serve(
    roots: Sequence[Path], port: int | None, report: Callable[[str, int], None], *, read_only: bool = False
) -> None:
    """Serve the dashboard until SIGINT or SIGTERM.

    Args:
        roots: Folders of runs, or run directories.
        port: The port; None: `DEFAULT_PORT`, or any other that is free.
        report: Is called with the URL, which has the token, and the port, once the server listens.
        read_only: Whether runs cannot be stopped and resumed from the page.

    Raises:
        EnvironmentFault: The port is taken.
    """
    listener = _listen(port)
    try:
        asyncio.run(_serve(roots, listener, report, read_only))
    finally:
        listener.close()


async def _serve(
    roots: Sequence[Path], listener: socket.socket, report: Callable[[str, int], None], read_only: bool
) -> None:
    port = listener.getsockname()[1]
    token = secrets.token_urlsafe(32)
    curves = Curves(cache_root() / "dashboard")
    server = Server(Catalogue(roots), curves, Guard(port, token), read_only=read_only)
    runner = web.AppRunner(server.app, access_log=None, handle_signals=False, shutdown_timeout=2.0)
    await runner.setup()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, ended.set)
    try:
        await web.SockSite(runner, listener).start()
        report(f"http://{HOST}:{port}/?token={token}", port)
        await ended.wait()
    finally:
        await runner.cleanup()


def _listen(port: int | None) -> socket.socket:
    """Return a listening socket of the loopback interface."""
    for choice in [port] if port is not None else [DEFAULT_PORT, 0]:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, choice))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            if port is not None or error.errno != errno.EADDRINUSE:
                reason = error.strerror or os.strerror(error.errno or errno.EADDRINUSE)
                raise EnvironmentFault(
                    f"port {choice} of {HOST} cannot be used: {reason}", "name another with --port, or leave it out"
                ) from None
    raise AssertionError("port 0 is any free port")
