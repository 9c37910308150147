"""How the processes of a job find each other: over files on one node, over one server on several.

torch's own rendezvous listens on every interface and stores a pickle, which whoever connects may replace. Here one node
needs no server at all. On several nodes the first one opens the server's socket itself, on one address and a random
port, and writes both and a token into the run directory, which only its owner can read. docs/security.md tells what
remains open.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.core import network, records
from trainer.core.errors import EnvironmentFault
from trainer.core.files import write_atomic
from trainer.core.locks import locked_or_closed
from trainer.core.network import LocalAddress

JOIN_TIMEOUT_S = 600.0
"""Longest that a node waits for the first one, as torchrun does by default."""
_POLL_S = 0.25
_PREFIX = "trainer-ranks-"
_YOUNG_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server of a job on several nodes, as the first node writes it into the run directory."""

    address: str
    port: int
    token: str
    """Prefix of all keys, so that clients of another job do no harm. It is no password: the protocol has none."""
    host: str = ""

    @property
    def endpoint(self) -> str:
        """ADDRESS:PORT, with brackets around an IPv6 address."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Link:
    """What this node needs to join the others."""

    own: LocalAddress
    server: Server
    listener: socket.socket | None = None
    """The socket of the server, on the first node."""


@dataclass(frozen=True)
class Place:
    """Position of this node among the nodes of the job."""

    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    """HOST or HOST:PORT of the first node; None on a single node that no job script has started."""
    peers: tuple[str, ...] = ()
    """Names of the nodes of the job, first the first node, if the job script knows them."""
    interface: str | None = None
    """Interface that gloo and NCCL have to use between nodes (`cluster.network_interface`); None: the one of the route
    to the others for gloo, any for NCCL."""
    address: str | None = None
    """Address of this node, if it was given by hand."""
    link: Link | None = None
    """Own address and server of a job on several nodes, once they are known; None on a single node."""


def join(
    path: Path,
    place: Place,
    *,
    timeout_s: float = JOIN_TIMEOUT_S,
    is_needed: Callable[[], bool] = lambda: True,
) -> Link:
    """Open the server on the first node, or wait on another node until the first has.

    Args:
        path: Where the first node writes the server's address. Each attempt needs its own.
        place: Position of this node. If `rendezvous` has a port, no file is needed.
        timeout_s: Longest time to wait for the first node.
        is_needed: Whether to continue waiting.

    Raises:
        EnvironmentFault: This node is the first and cannot be the server, or is another and does not find it.
    """
    named = place.rendezvous or ""
    host, _, port = named.rpartition(":") if ":" in named else (named, "", "0")
    others = [peer for peer in [*place.peers, host] if peer and peer != socket.gethostname()]
    own = network.own_address(place.interface, place.address, others)
    if place.node_rank == 0:
        return _serve(path, own, host, int(port))
    if int(port):
        return Link(own, Server(address=host, port=int(port), token=path.stem, host=host))
    return Link(own, wait_for(path, host, timeout_s, is_needed))


def _serve(path: Path, own: LocalAddress, host: str, port: int) -> Link:
    name = socket.gethostname()
    if port and not network.is_local(host):
        raise EnvironmentFault(
            f"{name} is node 0, but {host} of --rendezvous is another machine",
            "start node 0 on the machine that --rendezvous names, or name this one",
        )
    try:
        listener = network.listen(own.address, port)
    except OSError as error:
        raise EnvironmentFault(
            f"{name} is node 0 and cannot listen on {own.address} port {port or 'any'}: {error.strerror}",
            "choose another port or address, with --rendezvous or --local-addr",
        ) from error
    token = path.stem if port else secrets.token_hex(16)
    server = Server(address=own.address, port=listener.getsockname()[1], token=token, host=name)
    write_atomic(path, records.dumps(server))
    return Link(own, server, listener)


def wait_for(path: Path, host: str, timeout_s: float, is_needed: Callable[[], bool] = lambda: True) -> Server:
    """Return the server that the first node wrote to `path`.

    Raises:
        EnvironmentFault: It has not within `timeout_s`, or is no longer needed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        server = records.read_or_skip(Server, path)
        if server is not None:
            return server
        if not is_needed():
            raise EnvironmentFault("the attempt was ended before node 0 had opened its server")
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"node 0 ({host}) has not opened its server within {timeout_s:.0f} s",
                "see its log; does it share the run directory with this node?",
            )
        time.sleep(_POLL_S)
        _look_again(path)


def _look_again(path: Path) -> None:
    """Change the folder of `path`: a client of NFS otherwise believes for up to a minute that a file is missing."""
    probe = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch(0o600)
        probe.unlink()
    except OSError:
        pass


def socket_variables(interface: str | None, chosen: bool) -> dict[str, str]:
    """Return the variables that make gloo, and where `chosen` NCCL and TensorPipe too, use an interface.

    gloo otherwise resolves the name of the machine. NCCL finds its interfaces itself, and may use several.
    """
    names = ["GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"] if chosen else [])]
    return dict.fromkeys(names, interface) if interface else {}


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, for the store of one node; it is removed at the end.

    It is not in the run directory because not every network file system has locks. It is locked while it is used, so
    that the next call can remove what a killed process has left. systemd-tmpfiles leaves locked folders alone, too.
    """
    _remove_left_over()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_left_over() -> None:
    """Remove this user's folders of `private_folder` whose process is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
        except OSError:
            continue
        # One that is not locked yet has just been made.
        if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG_S:
            continue
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return the descriptor of a lock on a folder; None if another process has it, or it is no folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    return locked_or_closed(descriptor)
