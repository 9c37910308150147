"""Which address of this machine the other nodes of a job are told."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from trainer.core import network
from trainer.core.errors import EnvironmentFault
from trainer.core.network import LocalAddress

CARDS = [LocalAddress("127.0.0.1", "lo"), LocalAddress("10.1.0.7", "eth0"), LocalAddress("10.9.0.7", "ib0")]


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine `here` with Ethernet and InfiniBand, whose own name is mapped to 127.0.1.1, as Debian does."""
    names = {"here": "127.0.1.1", "there": "10.9.0.8", "192.0.2.1": "192.0.2.1"}
    source = {"127.0.1.1": "127.0.0.1", "10.9.0.8": "10.9.0.7", "192.0.2.1": "10.1.0.7"}

    class Probe:
        def __init__(self, *_: Any) -> None:
            self.target = ""

        def connect(self, target: tuple[str, int]) -> None:
            self.target = target[0]

        def getsockname(self) -> tuple[str, int]:
            return source[self.target], 1

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    def getaddrinfo(name: str, port: int, **_: Any) -> list[Any]:
        if name not in names:
            raise socket.gaierror(name)
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (names[name], port))]

    monkeypatch.setattr(network, "addresses", lambda: CARDS)
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"peers": ["there"]}, "10.9.0.7 (ib0)"),
        ({"peers": ["here", "there"]}, "10.9.0.7 (ib0)"),
        ({"peers": ["here"]}, "10.1.0.7 (eth0)"),
        ({"peers": ["unknown"]}, "10.1.0.7 (eth0)"),
        ({"interface": "ib0", "peers": ["unknown"]}, "10.9.0.7 (ib0)"),
        ({"address": "10.1.0.7", "peers": ["there"]}, "10.1.0.7 (eth0)"),
    ],
    ids=["by the route", "own name skipped", "own name alone", "unknown peer", "by the interface", "given"],
)
def test_the_address_is_one_that_others_reach(asked: dict[str, Any], expected: str) -> None:
    assert str(network.own_address(**asked)) == expected


@pytest.mark.usefixtures("two_cards")
def test_an_interface_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(EnvironmentFault) as raised:
        network.own_address("ib7")
    assert "no network interface ib7" in raised.value.message
    assert raised.value.fix == "set cluster.network_interface to one of: eth0, ib0, lo"


def test_this_machine_has_a_loopback_interface_and_no_address_of_documentation() -> None:
    loopback = network.loopback_interface()
    assert LocalAddress("127.0.0.1", loopback) in network.addresses()
    assert network.own_address(loopback) == LocalAddress("127.0.0.1", loopback)
    assert network.is_local("127.0.0.1")
    assert not network.is_local("192.0.2.1")
    with pytest.raises(EnvironmentFault, match=r"192\.0\.2\.1 is not an address of"):
        network.own_address(address="192.0.2.1")
