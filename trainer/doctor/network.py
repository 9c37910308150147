"""Checks of the network: the name of this machine, ports, links, the clock, W&B."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

from trainer.core.errors import UserError
from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.probe import Probe
from trainer.tracking import client_settings

_MOST_SKEW_S, _SOME_SKEW_S = 5.0, 0.5
_LEAST_PORTS = 1000
_WANDB_S = 5.0
_WANDB = "https://api.wandb.ai"
_CREDENTIALS = re.compile(r"://[^/@\s]*@")


def hostname(probe: Probe) -> Iterator[Finding]:
    """Check that the host name resolves to an address that other machines can reach."""
    name = probe.hostname()
    found = probe.resolve(name)
    outside = [one for one in found if not ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    own = _own_address(probe)
    line = f"{own or 'ADDRESS'} {name}"
    if not found:
        fix = f"echo '{line}' | sudo tee -a /etc/hosts"
        yield warning(f"the host name {name} does not resolve: gloo in other programs fails or hangs", fix)
    elif not outside:
        fix = f"write '{line}' in /etc/hosts in place of {found[0]}; trainer itself does not use the name"
        yield warning(f"the host name {name} resolves to {found[0]}: other nodes would connect to themselves", fix)
    else:
        yield ok(f"{name} is {outside[0]}")


def ports(probe: Probe) -> Iterator[Finding]:
    """Check that ranks can listen, on the loopback interface and on the address for other nodes."""
    is_good = True
    for address in filter(None, ("127.0.0.1", _own_address(probe))):
        problem = probe.can_listen(address)
        if problem:
            is_good = False
            fix = "ip address; a sandbox or a container without a network forbids it"
            yield error(f"no port of {address} can be opened: {problem}", fix)
    first, _, last = probe.read("proc/sys/net/ipv4/ip_local_port_range").partition("\t")
    if first.isdigit() and last.isdigit() and int(last) - int(first) < _LEAST_PORTS:
        is_good = False
        fix = 'sudo sysctl -w net.ipv4.ip_local_port_range="32768 60999"'
        yield warning(f"only ports {first} to {last} are available for connections", fix)
    left = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE") if name in probe.environment]
    if left and "TORCHELASTIC_RUN_ID" not in probe.environment:
        is_good = False
        yield warning(
            f"{', '.join(left)} is set in this shell: other launchers would use it", f"unset {' '.join(left)}"
        )
    if is_good:
        yield ok("ports can be opened" + (f" on 127.0.0.1 and {own}" if (own := _own_address(probe)) else ""))


def fabric(probe: Probe) -> Iterator[Finding]:
    """Check the ports of InfiniBand."""
    down, up = [], 0
    for device in probe.entries("sys/class/infiniband"):
        for port in probe.entries(f"sys/class/infiniband/{device}/ports"):
            state = probe.read(f"sys/class/infiniband/{device}/ports/{port}/state")
            if "ACTIVE" in state:
                up += 1
            elif state:
                down.append(f"{device}/{port} {state.partition(':')[2].strip().lower()}")
    if not up and not down:
        yield skipped("no InfiniBand or RoCE here")
    elif not up:
        yield error(f"no port is up: {', '.join(down)}", "check the cable and the subnet manager: ibstat")
    elif down:
        yield warning(f"{up} up; down: {', '.join(down)}", "ibstat; leave unused ports out with NCCL_IB_HCA")
    else:
        yield ok(f"{up} port{'s' * (up > 1)} up")


def clock(probe: Probe) -> Iterator[Finding]:
    """Check the clock, against that of the file system and by the kernel's own state."""
    fix = "sudo systemctl restart chrony (or systemd-timesyncd); chronyc tracking shows the difference"
    skew_s = 0.0 if probe.storage is None else abs(probe.storage.skew_s)
    if skew_s > _MOST_SKEW_S:
        yield error(f"differs by {skew_s:.1f} s from the file system of the runs: newer files look older", fix)
    elif skew_s > _SOME_SKEW_S:
        yield warning(f"differs by {skew_s:.1f} s from the file system of the runs", fix)
    elif probe.is_clock_synchronized() is False:
        yield warning("not synchronized with a time server", fix)
    elif probe.is_clock_synchronized() is None:
        yield skipped("whether it is synchronized is not known")
    else:
        yield ok("synchronized")


def weights_and_biases(probe: Probe) -> Iterator[Finding]:
    """Check that W&B can be reached, if runs log to it online."""
    try:
        settings = client_settings.read(probe.environment, Path.cwd())
        mode = client_settings.mode_of(probe.tracking_mode, probe.environment, Path.cwd())
    except UserError as problem:
        yield error(problem.message, problem.fix)
        return
    if mode.value in ("offline", "disabled"):
        yield skipped(f"runs log {'offline' if mode.value == 'offline' else 'nothing'} ({mode.source})")
        return
    url = _CREDENTIALS.sub("://", settings["base_url"].value if "base_url" in settings else _WANDB)
    problem_text = probe.fetch(url, _WANDB_S)
    if problem_text:
        fix = "tracking.mode=offline, and `trainer sync` from a machine with a network; or set HTTPS_PROXY"
        yield warning(f"{url} cannot be reached: {problem_text}", fix)
    elif client_settings.key_source(probe.environment, Path.cwd()) is None:
        yield warning(f"{url} can be reached, but there is no API key", "wandb login, or set WANDB_API_KEY")
    else:
        yield ok(f"{url} is reached")


def _own_address(probe: Probe) -> str:
    """Return the first address that is not loopback; empty if there is none."""
    for one in probe.addresses():
        if not ipaddress.ip_address(one.address).is_loopback:
            return one.address
    return ""
