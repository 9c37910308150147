"""A variant and the bare loop that it is compared with, which train a few steps in turn, in one process.

The variant stops where it fetches a batch: no hook of any framework is needed to stop or to measure it.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Protocol

from trainer.runtime.process import die_with_parent

WAIT_S = 120.0
"""How long the conductor waits for a rank before it gives up; a turn takes a few seconds."""

Cost = tuple[float, float, float]
"""CPU microseconds (of all threads), wall microseconds, page faults; each a step."""


@dataclass(frozen=True)
class Blocks:
    """How the steps of a training fall into turns: the first block warms up, then `count` are measured."""

    count: int
    settle: int
    """Steps at the start of each block that do not count: the other one's code is in the caches."""
    measured: int

    @property
    def length(self) -> int:
        return self.settle + self.measured

    @property
    def steps(self) -> int:
        """One more than all blocks: the end of the last is seen at the fetch that follows."""
        return (1 + self.count) * self.length + 1


class Twin(Protocol):
    """What a variant is compared with."""

    def train(self, steps: int) -> None: ...


class Pace:
    """The side of the variant: after each of its blocks its twin trains one, in the same process.

    So both have the same memory and caches. Of two processes that do the same one took up to 5% longer than the other
    for all of its life, by where its tensors came to lie; and the machine's own speed changes within seconds.
    """

    def __init__(self, blocks: Blocks, conductor: Connection) -> None:
        self.blocks = blocks
        self.make_twin: Callable[[], Twin]
        """Called at the first fetch, when the variant has made its process group."""
        self._conductor = conductor
        self._begun = (0.0, 0.0, 0.0)
        self._twin: Twin

    def tell(self, cost: Sequence[float]) -> None:
        self._conductor.send(cost)

    def at_fetch(self, number: int) -> None:
        """`number` counts the batches of the variant's training from 0. After each block its cost and then the twin's
        are told; in the end both have trained equally long."""
        place = number % self.blocks.length
        if number == 0:
            self._twin = self.make_twin()
        elif place == 0:
            mine = self._cost()
            self._twin.train(self.blocks.settle)
            self._begun = _now()
            self._twin.train(self.blocks.measured)
            self.tell(mine + self._cost())
        elif place == self.blocks.settle:
            self._begun = _now()
        if number == self.blocks.steps - 1:
            self._twin.train(1)

    def _cost(self) -> list[float]:
        """Since `_begun`, a step."""
        return [
            (now - begun) / self.blocks.measured * scale
            for now, begun, scale in zip(_now(), self._begun, (1e6, 1e6, 1), strict=True)
        ]


class Alone:
    """In the place of `Pace`: trains without a twin, and tells the peak of the memory of its own."""

    def __init__(self, steps: int, conductor: Connection) -> None:
        self.steps = steps
        self._conductor = conductor

    def at_fetch(self, number: int) -> None:
        """Reset the peak of the process at the first batch, tell it at the last."""
        if number == 0:
            Path("/proc/self/clear_refs").write_text("5")
        elif number == self.steps - 1:
            self._conductor.send((_anonymous_peak_mb(),))


def _anonymous_peak_mb() -> float:
    """The peak of the resident memory, without files that are mapped, such as libraries: which of their pages are
    resident depends on what has run, and all processes share them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, files = (int(lines[name].split()[0]) for name in ("VmHWM", "RssFile"))
    return (peak - files) / 1024


def _now() -> Cost:
    return time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


Train = Callable[[Any, Path], Any]
"""Trains a variant as this rank, with files in the folder; what it returns is handed to the conductor."""


class Ranks:
    """The side of the conductor: all ranks of one variant."""

    def __init__(self, train: Train, world_size: int, blocks: Blocks | int, folder: Path) -> None:
        """Start them; `blocks` is a number of steps if they train alone."""
        self._processes: list[ForkProcess] = []
        self._ends: list[Connection] = []
        port = _free_port()
        pace = partial(Alone if isinstance(blocks, int) else Pace, blocks)
        folder.mkdir(parents=True)
        for rank in range(world_size):
            mine, theirs = Pipe()
            process = ForkProcess(
                target=_child,
                args=(train, _torchrun(rank, world_size, port), pace(theirs), theirs, folder),
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


def _child(train: Train, environment: dict[str, str], pace: Any, conductor: Connection, folder: Path) -> None:
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
