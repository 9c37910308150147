"""Variants in processes of their own that train a few steps in turn, so that what else the machine does hits them all.

A variant stops where it fetches a batch: no hook of any framework is needed to stop or to measure it, and in its own
process it has its own allocator, thread pools and heartbeat, as in life.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from trainer.worker.process import die_with_parent

WAIT_S = 120.0
"""How long either side waits for the other before it gives up; a turn takes a few seconds."""

Cost = tuple[float, float, float]
"""CPU microseconds (of all threads), wall microseconds, page faults; each a step."""


@dataclass(frozen=True)
class Blocks:
    """How the steps of a training fall into turns: the first block warms up, then `count` are measured."""

    count: int
    settle: int
    """Steps at the start of each block that do not count: another process had the caches."""
    measured: int

    @property
    def length(self) -> int:
        return self.settle + self.measured

    @property
    def steps(self) -> int:
        """One more than all blocks: the end of the last is seen at the fetch that follows."""
        return (1 + self.count) * self.length + 1


class Pace:
    """The side of the variant: `at_fetch` of each batch measures and waits for its turn."""

    def __init__(self, blocks: Blocks, conductor: Connection) -> None:
        self.blocks = blocks
        self._conductor = conductor
        self._begun = (0.0, 0.0, 0.0)

    def tell(self, cost: Cost | list[float]) -> None:
        self._conductor.send(cost)

    def at_fetch(self, number: int) -> None:
        """`number` counts the batches of the training from 0."""
        place = number % self.blocks.length
        if place == self.blocks.settle:
            self._begun = _now()
        elif place == 0:
            cost = [
                (now - begun) / self.blocks.measured * scale
                for now, begun, scale in zip(_now(), self._begun, (1e6, 1e6, 1), strict=True)
            ]
            self.tell((cost[0], cost[1], cost[2]))
            if not self._conductor.poll(WAIT_S):
                raise TimeoutError("the conductor of the turns is gone")
            self._conductor.recv()


def _now() -> Cost:
    return time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


Train = Callable[[Pace, Path], Any]
"""Trains a variant as this rank, with files in the folder; what it returns is handed to the conductor."""


class Ranks:
    """The side of the conductor: all ranks of one variant."""

    def __init__(self, train: Train, world_size: int, blocks: Blocks, folder: Path) -> None:
        self._processes: list[ForkProcess] = []
        self._ends: list[Connection] = []
        port = _free_port()
        folder.mkdir(parents=True)
        for rank in range(world_size):
            mine, theirs = Pipe()
            process = ForkProcess(
                target=_child,
                args=(train, _torchrun(rank, world_size, port), Pace(blocks, theirs), theirs, folder),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(mine)

    def reached(self) -> tuple[float, ...]:
        """Wait until every rank has told a cost; their mean."""
        costs = [self._receive(end) for end in self._ends]
        return tuple(round(sum(values) / len(values), 1) for values in zip(*costs, strict=True))

    def go(self) -> None:
        for end in self._ends:
            end.send(None)

    def results(self) -> list[Any]:
        """What each rank's training returned."""
        found = [self._receive(end) for end in self._ends]
        for process in self._processes:
            process.join(WAIT_S)
        return found

    def _receive(self, end: Connection) -> Any:
        if not end.poll(WAIT_S):
            raise TimeoutError("a variant did not come to the end of its turn")
        return end.recv()

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(WAIT_S)


@contextmanager
def started(variants: dict[str, Train], world_size: int, blocks: Blocks, folder: Path) -> Iterator[dict[str, Ranks]]:
    """Each variant forked, built, and waiting before its first batch."""
    running: dict[str, Ranks] = {}
    try:
        for name, train in variants.items():
            running[name] = Ranks(train, world_size, blocks, folder / name)
        for ranks in running.values():
            ranks.reached()
        yield running
    finally:
        for ranks in running.values():
            ranks.kill()


def in_turn(running: dict[str, Ranks], blocks: Blocks) -> dict[str, list[tuple[float, ...]]]:
    """Train all the blocks, each other time in reversed order; the costs of the measured ones."""
    costs: dict[str, list[tuple[float, ...]]] = {name: [] for name in running}
    for number in range(1 + blocks.count):
        for name in list(running)[:: -1 if number % 2 else 1]:
            running[name].go()
            cost = running[name].reached()
            if number > 0:
                costs[name].append(cost)
    return costs


def _child(train: Train, environment: dict[str, str], pace: Pace, conductor: Connection, folder: Path) -> None:
    die_with_parent()
    os.environ.update(environment)
    log = os.open(folder / f"rank-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    conductor.send(train(pace, folder))


def _torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would tell this rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "parity",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
