"""Addresses and network interfaces of this machine, read without a package and without asking a name server."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.core.errors import EnvironmentFault

_SIOCGIFADDR = 0x8915
"""Request of ioctl(2) for the IPv4 address of an interface: netdevice(7)."""
_NOT_A_PEER = "192.0.2.1"
"""An address of documentation (RFC 5737): the route to it is the default route. Nothing is sent there."""


@dataclass(frozen=True)
class LocalAddress:
    """An address of this machine, and the interface that has it."""

    address: str
    interface: str | None
    """None if the system does not tell it."""

    def __str__(self) -> str:
        return f"{self.address} ({self.interface})" if self.interface else self.address


def loopback_interface() -> str:
    """Return the name of the loopback interface: lo, or lo0 on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")


def addresses(if_inet6: Path = Path("/proc/net/if_inet6")) -> list[LocalAddress]:
    """Return the addresses of this machine: per interface the IPv4 address, then the IPv6 ones that are routed."""
    found = []
    names = [name for _, name in socket.if_nameindex()]
    if sys.platform == "linux":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for name in names:
                try:
                    request = struct.pack("256s", name.encode()[:15])
                    answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                except OSError:  # it has none
                    continue
                found.append(LocalAddress(socket.inet_ntoa(answer[20:24]), name))
    try:
        lines = if_inet6.read_text().splitlines()
    except OSError:  # no IPv6
        lines = []
    for line in lines:
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(int(digits, 16))
        if not address.is_link_local:
            found.append(LocalAddress(str(address), name))
    return found


def own_address(interface: str | None = None, address: str | None = None, peers: Sequence[str] = ()) -> LocalAddress:
    """Return the address of this machine that the other nodes of a job reach.

    The name of this machine does not tell it: Debian maps it to 127.0.1.1.

    Args:
        interface: Name of the interface to use; None: that of the route to the first of `peers` whose name is known,
            else that of the default route.
        address: The address itself, if it was given.
        peers: Names or addresses of other nodes of the job.

    Raises:
        EnvironmentFault: There is no such interface or address, or this machine has no network.
    """
    known = addresses()
    if address is not None:
        of_address = [one for one in known if one.address == address]
        if not of_address and not is_local(address):
            have = ", ".join(map(str, known))
            raise EnvironmentFault(f"{address} is not an address of {socket.gethostname()}", f"it has {have}")
        return of_address[0] if of_address else LocalAddress(address, interface)
    if interface is not None:
        of_interface = [one for one in known if one.interface == interface]
        if not of_interface:
            names = ", ".join(sorted({str(one.interface) for one in known}))
            raise EnvironmentFault(
                f"{socket.gethostname()} has no network interface {interface} with an address",
                f"set cluster.network_interface to one of: {names}",
            )
        return of_interface[0]
    for peer in [*peers, _NOT_A_PEER]:
        source = _source_address(peer)
        if source is not None:
            return next((one for one in known if one.address == source), LocalAddress(source, None))
    outside = [one for one in known if not ipaddress.ip_address(one.address).is_loopback]
    if outside:
        return outside[0]
    raise EnvironmentFault(
        f"{socket.gethostname()} has no address that other nodes can reach",
        "connect it, or name the interface: cluster.network_interface=eth0",
    )


def _source_address(peer: str) -> str | None:
    """Return the address from which this machine would send to `peer`; None if it is unknown, or is this machine."""
    try:
        candidates = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in candidates:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of a datagram socket: chooses the route, sends nothing
                source = str(probe.getsockname()[0])
        except OSError:
            continue
        if not ipaddress.ip_address(source.partition("%")[0]).is_loopback:
            return source
    return None


def is_local(address: str) -> bool:
    """Return whether this machine can listen on `address`, a number or a name."""
    try:
        listen(address).close()
    except OSError:
        return False
    return True


def listen(address: str, port: int = 0) -> socket.socket:
    """Return a socket that listens on this address only; port 0: a free port, chosen by the system.

    Raises:
        OSError: The address is not one of this machine, or the port is taken.
    """
    family, *_, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener
