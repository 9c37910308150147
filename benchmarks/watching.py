#!/usr/bin/env python3
"""How many file operations it takes to watch a job of 1 to 512 nodes: `benchmarks/watching.py [--keep]`.

Runs the supervisor of every node and the heartbeat of every rank, in one process and by a clock of its own, and counts
the calls that name a file of the run directory, which a shared file system has to answer: open, stat, list, rename.
Nothing trains. The ranks are eight a node, and each is at another step each second.
"""

from __future__ import annotations

import argparse
import builtins
import io
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from kept import keep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.config.shape import LaunchShape
from trainer.runs.directory import RunDirectory
from trainer.runs.node_folder import NODE_FOLDER_VARIABLE, NodeFolder
from trainer.runs.records import HeartbeatRecord
from trainer.supervise import hang_response, supervisor
from trainer.supervise.relay import interval_s
from trainer.supervise.rendezvous import Place

NODES = (1, 8, 64, 512)
RANKS_PER_NODE = 8
SECONDS = 16
AGREE_EVERY_S = 1
"""As `resilience.agree_every_s`: a rank then looks whether it should stop."""
COUNTED = ("open", "stat", "lstat", "listdir", "scandir", "rename", "replace", "unlink", "mkdir")
METRICS = {f"train/{name}": 0.123456 for name in ("loss", "lr", "samples_per_s", "tokens_per_s", "mfu")}


class FileOperations:
    """Counts the calls that name a path in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.who = ""
        """The process that the calls are made for."""
        self.counts: Counter[str] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count until the end of the block."""
        kept = {name: getattr(os, name) for name in COUNTED}
        opened = builtins.open
        for name, function in kept.items():
            setattr(os, name, self._counted(function))
        builtins.open = io.open = self._counted(opened)  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(os, name, function)
            builtins.open = io.open = opened

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            named = arguments[0] if arguments else None
            if isinstance(named, (str, os.PathLike)) and os.fspath(named).startswith(self._folder):
                self.counts[self.who] += 1
            return function(*arguments, **options)

        return call


class Node:
    """The supervisor of a node and the heartbeats of its ranks, none of which is a process."""

    def __init__(self, run: RunDirectory, number: int, nodes: int, folder: Path) -> None:
        folder.mkdir()
        self.number, self._run = number, run
        self._ranks = range(number * RANKS_PER_NODE, (number + 1) * RANKS_PER_NODE)
        self._shared = NodeFolder(folder) if nodes > 1 else run
        place = Place(nodes, number, "node0" if nodes > 1 else None)
        self.supervisor = supervisor.Supervisor(run, LaunchShape(nodes, RANKS_PER_NODE, "cpu"), place)
        self.supervisor.node_log.parent.mkdir(parents=True, exist_ok=True)
        self.supervisor.node_log.touch()
        self.supervisor._start_watching(folder)

    def beat(self, second: int) -> None:
        """Do what the heartbeat threads of the ranks do each second, and what a step does at times."""
        for rank in self._ranks:
            beat = HeartbeatRecord(
                time=time.time(),
                step=second,
                pid=rank,
                host=socket.gethostname(),
                phase="train",
                metrics=METRICS,
                batches=64,
                own_s=0.1,
                batch_s=0.2,
            )
            self._shared.write_heartbeat(rank, beat)
            self._shared.collectives_request(0).exists()
            if second % AGREE_EVERY_S == 0:
                self._shared.stop_request.exists()


def simulate(nodes: int, seconds: int = SECONDS) -> dict[str, float]:
    """Return file operations per second: of all processes, of the first node and of another one."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "runs" / "watched-abcdefgh")
        for inside in (run.live_dir, run.logs_dir, run.attempts_dir, run.stop_request.parent):
            inside.mkdir(parents=True)
        resilience = {"max_restarts": 3, "stop_deadline_s": 60.0, "straggler_factor": 1.5}
        options = {"resources": {"gpus": 0}, "tracking": {}, "trainer": {}, "resilience": resilience}
        run.config_path.write_text(yaml.safe_dump(options))
        clock = SimpleNamespace(now=1e6)
        fake = SimpleNamespace(monotonic=lambda: clock.now, time=time.time, sleep=time.sleep)
        real = supervisor.time, hang_response.time
        supervisor.time = hang_response.time = fake  # type: ignore[assignment]
        os.environ["TRAINER_ATTEMPT"] = "0"
        os.environ.pop(NODE_FOLDER_VARIABLE, None)
        try:
            members = [Node(run, number, nodes, Path(folder) / f"node-{number}") for number in range(nodes)]
            operations = FileOperations(run.path)
            with operations.counting():
                _run(members, operations, clock, seconds, interval_s(nodes) or supervisor.POLL_S)
        finally:
            supervisor.time, hang_response.time = real
    rates = {who: count / seconds for who, count in operations.counts.items()}
    return {"all": sum(rates.values()), "first": rates["0"], "other": rates.get("1", rates["0"])}


def _run(members: list[Node], operations: FileOperations, clock: Any, seconds: int, every_s: float) -> None:
    looked, child = -every_s, SimpleNamespace(pid=2**22)
    for tenth in range(seconds * 10):
        clock.now += 0.1
        looks = tenth / 10 - looked >= every_s - 1e-9
        looked = tenth / 10 if looks else looked
        for member in members:
            operations.who = str(member.number)
            if tenth % 10 == 0:
                member.beat(tenth // 10)
            if looks:
                member.supervisor._look(child)  # type: ignore[arg-type]


def table(nodes: tuple[int, ...] = NODES) -> str:
    """Return the table of the simulations."""
    lines = [
        "| nodes | ranks | seconds between looks | operations/s, all | first node | another node |",
        "|---|---|---|---|---|---|",
    ]
    for count in nodes:
        rates = simulate(count)
        every_s = interval_s(count) or supervisor.POLL_S
        cells = (count, count * RANKS_PER_NODE, f"{every_s:g}", *(f"{rates[who]:,.0f}" for who in rates))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write results/watching.md")
    options = parser.parse_args()
    text = table()
    print(text)
    if options.keep:
        keep("watching", "File operations to watch a job", text)


if __name__ == "__main__":
    main()
