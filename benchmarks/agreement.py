#!/usr/bin/env python3
"""What it costs that ranks find each other and agree: `benchmarks/agreement.py [--keep]`.

Groups: ranks are forked from one process, and run the set-up of a rank (`torch_setup.init_process_group`) and then
agreements, once with all ranks connected to each other and once with the tree of large jobs (`cpu_groups.py`). Requests
to the store, sockets and CPU seconds are counted; times depend on the number of cores, which all ranks share.

Launch: the torchrun agents of all nodes are threads of this process, with a store that counts. Saves: see
`agreement_save.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from agreement_save import SIZES, save_table
from kept import keep
from torch.distributed import HashStore, Store, TCPStore
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

from trainer.runtime import cpu_groups, store, torch_setup
from trainer.runtime.process import STORE_VARIABLE, Rank

RANKS = (16, 64, 128, 256)
EXTRAPOLATED = (512, 1024, 4096)
NODES = (8, 64, 512)
AGREEMENTS = 15
LIMIT = timedelta(seconds=180)


class CountingStore(Store):
    """Passes requests on to another store and counts them."""

    def __init__(self, inner: Store) -> None:
        super().__init__()
        self.inner, self.requests, self.bytes = inner, Counter[str](), 0

    def set(self, key: str, value: Any) -> None:
        self._count("set", len(value))
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        value = self.inner.get(key)
        self._count("get", len(value))
        return value

    def add(self, key: str, amount: int) -> int:
        self._count("add", 8)
        return self.inner.add(key, amount)

    def wait(self, keys: list[str], timeout: timedelta = LIMIT) -> None:
        self._count("wait", 0)
        self.inner.wait(keys, timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = self.inner.multi_get(keys)
        self._count("multi_get", sum(map(len, values)))
        return values

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        self._count("multi_set", sum(map(len, values)))
        self.inner.multi_set(keys, values)

    def has_extended_api(self) -> bool:
        return True

    def _count(self, name: str, num_bytes: int) -> None:
        self.requests[name] += 1
        self.bytes += num_bytes


def groups(ranks: int, with_tree: bool) -> dict[str, float]:
    """Set up `ranks` ranks as processes, let them agree, and return what that took."""
    port, server = _start_server()
    begun = [_start_rank(rank, ranks, port, with_tree) for rank in range(ranks)]
    found = []
    for pid, reader in begun:
        with os.fdopen(reader, "rb") as file:
            found.append(json.loads(file.read() or b"null"))
        os.waitpid(pid, 0)
    os.kill(server, signal.SIGKILL)
    server_s = _cpu_s(os.wait4(server, 0)[2])
    if None in found:
        raise SystemExit(f"{found.count(None)} of {ranks} ranks failed")
    requests = sum(one["requests"] for one in found)
    return {
        "setup_s": max(one["setup_s"] for one in found),
        "cpu_ms": 1e3 * sum(one["cpu_s"] for one in found) / ranks,
        "sockets": max(one["sockets"] for one in found),
        "requests": requests / ranks,
        "kb": sum(one["bytes"] for one in found) / ranks / 1e3,
        "server_us": 1e6 * server_s / requests,
        "agree_ms": 1e3 * found[0]["agree_s"],
        "agree_cpu_ms": 1e3 * sum(one["agree_cpu_s"] for one in found) / ranks,
    }


def _start_server() -> tuple[int, int]:
    """Start the store in a process of its own: ranks must not be forked from a process with threads."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
        os.write(writer, str(server.port).encode())
        signal.alarm(600)
        signal.pause()
    os.close(writer)
    port = int(os.read(reader, 8))
    os.close(reader)
    return port, pid


def _start_rank(rank: int, ranks: int, port: int, with_tree: bool) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(LIMIT.total_seconds()))
        try:
            os.write(writer, json.dumps(_rank(rank, ranks, port, with_tree)).encode())
        except BaseException as error:
            print(f"rank {rank}: {error}", file=sys.stderr)
        os._exit(0)
    os.close(writer)
    return pid, reader


def _rank(rank: int, ranks: int, port: int, with_tree: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    os.environ |= {
        STORE_VARIABLE: "tcp:benchmark",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_GLOO_LAZY_INIT": str(int(with_tree)),
    }
    cpu_groups.FULL_MESH_UP_TO = torch_setup.FULL_MESH_UP_TO = 1 if with_tree else ranks  # type: ignore[attr-defined]
    counted: list[CountingStore] = []
    opened = store._open

    def open_counted(*arguments: Any) -> Store:
        counted.append(CountingStore(opened(*arguments)))
        return counted[-1]

    store._open = open_counted
    config: Any = SimpleNamespace(
        resources=SimpleNamespace(gpus=0), resilience=SimpleNamespace(collective_timeout_s=LIMIT.total_seconds())
    )
    began, cpu = time.monotonic(), time.process_time()
    group = torch_setup.init_process_group(config, Rank.from_environment())
    assert group is not None
    found = {"setup_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    found |= {"requests": counted[0].requests.total(), "bytes": counted[0].bytes}
    times, cpu = [], time.process_time()
    for _ in range(AGREEMENTS):
        dist.barrier(group)
        began = time.monotonic()
        cpu_groups.all_reduce(torch.tensor([1, 0, -rank]), dist.ReduceOp.MAX, group)
        times.append(time.monotonic() - began)
    found["agree_cpu_s"] = (time.process_time() - cpu) / AGREEMENTS
    found["agree_s"] = sorted(times)[AGREEMENTS // 2]
    found["sockets"] = sum(os.readlink(one).startswith("socket:") for one in _descriptors())
    dist.barrier(group)  # a rank that exits closes its connections
    return found


def _descriptors() -> list[str]:
    folder = "/proc/self/fd"
    return [f"{folder}/{name}" for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}")]


def _cpu_s(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def hops(ranks: int, with_tree: bool) -> int:
    """Return how many messages of an agreement follow each other: gloo reduces around a ring."""
    if not with_tree:
        return 2 * (ranks - 1)
    levels = [len(level) for level in cpu_groups.members(0, ranks)]
    return sum(2 * (size - 1) for size in levels) + sum(math.ceil(math.log2(size)) for size in levels[:-1])


def groups_table(sizes: list[int]) -> str:
    """Return the table of set-up and agreement, with extrapolated lines."""
    head = ["ranks", "connected", "set-up s", "CPU ms/rank", "sockets/rank", "store requests/rank", "KB/rank"]
    head += ["store server CPU s", "agreement ms", "CPU ms/rank", "hops"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    measured: dict[tuple[int, bool], dict[str, float]] = {}
    for with_tree in (False, True):
        name = "tree" if with_tree else "all"
        for ranks in sizes:
            one = measured[ranks, with_tree] = groups(ranks, with_tree)
            cells = [ranks, name, f"{one['setup_s']:.2f}", f"{one['cpu_ms']:.0f}", f"{one['sockets']:.0f}"]
            cells += [
                f"{one['requests']:.0f}",
                f"{one['kb']:,.1f}",
                f"{one['server_us'] * one['requests'] * ranks / 1e6:.2f}",
            ]
            cells += [f"{one['agree_ms']:.1f}", f"{one['agree_cpu_ms']:.2f}", hops(ranks, with_tree)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], file=sys.stderr)
        few, many = measured[sizes[-2], with_tree], measured[sizes[-1], with_tree]
        per_hop_ms = measured[sizes[-1], False]["agree_ms"] / hops(sizes[-1], False)
        for ranks in EXTRAPOLATED:
            values = {
                key: _line(ranks, sizes, few[key], many[key], with_tree, power)
                for key, power in {"sockets": 1, "requests": 1, "kb": 2}.items()
            }
            cells = [f"{ranks:,}", f"{name}, extrapolated", "", "", f"{values['sockets']:,.0f}"]
            cells += [f"{values['requests']:,.0f}", f"{values['kb']:,.1f}"]
            cells += [f"{many['server_us'] * values['requests'] * ranks / 1e6:,.1f}"]
            cells += [f"{per_hop_ms * hops(ranks, with_tree):.1f}", "", f"{hops(ranks, with_tree):,}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _line(ranks: int, sizes: list[int], few: float, many: float, with_tree: bool, power: int) -> float:
    """Extrapolate: linear in the number of ranks, the bytes with its square; with the tree in its logarithm."""
    scale = math.log2 if with_tree else (lambda count: float(count**power))
    slope = (many - few) / (scale(sizes[-1]) - scale(sizes[-2]))
    return many + slope * (scale(ranks) - scale(sizes[-1]))


def launch_table() -> str:
    """Return what torchrun's agents request from the store when they number the ranks of all nodes."""
    lines = ["| nodes | first node: requests, KB | another node: requests, KB |", "|---|---|---|"]
    for nodes in NODES:
        inner = HashStore()
        counted = [CountingStore(inner) for _ in range(nodes)]
        spec = SimpleNamespace(role="default", local_world_size=8)

        def agent(number: int, counted: list[CountingStore] = counted, spec: Any = spec) -> None:
            own: Any = SimpleNamespace()
            SimpleElasticAgent._assign_worker_ranks(own, counted[number], number, len(counted), spec)

        threads = [threading.Thread(target=agent, args=(number,)) for number in range(nodes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cells = [f"{sum(one.requests.values())}, {one.bytes / 1e3:.1f}" for one in (counted[0], counted[1])]
        lines.append(f"| {nodes} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="sizes of the groups; at least two")
    parser.add_argument("--saves", type=int, nargs="+", default=list(SIZES), help="simulated ranks of a save")
    parser.add_argument("--keep", action="store_true", help="write results/agreement.md")
    options = parser.parse_args()
    parts = {
        "Groups": groups_table(sorted(options.ranks)),
        "Launch": launch_table(),
        "Saves": save_table(options.saves),
    }
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in parts.items())
    print(text)
    if options.keep:
        keep("agreement", "Set-up and agreement of the ranks", text)


if __name__ == "__main__":
    main()
