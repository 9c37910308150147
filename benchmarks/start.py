#!/usr/bin/env python3
"""How long a job takes to its first step, and again after a rank was killed: ranks forked from a process that has
imported what they need (`trainer/supervise/agent.py`), and ranks that each import for themselves.

    .venv/bin/python benchmarks/start.py             one, two and four ranks; about six minutes on two quiet cores
    .venv/bin/python benchmarks/start.py --keep      also writes benchmarks/results/start.md

The ways take turns, in an order by chance. Counted is from the command to the moment at which each rank has written
that it trains, and from the kill to the same moment of the next attempt; CPU time is of all processes of the job.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kept import keep

from trainer.core import processes
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved

WAYS = {"each imports": {"TRAINER_PRELOAD": ""}, "forked": {}}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
TIMEOUT_S = 300.0
MEASURES = ("start, s", "start, CPU s", "restart, s", "restart, CPU s")


def measure(ranks: int, way: str, folder: Path) -> dict[str, float]:
    """One job: its start, one rank killed, its restart. Seconds by `MEASURES`."""
    job = ["experiment=quickstart", "tracking=none", "resources.gpus=0", f"resources.cpu_processes={ranks}"]
    endless = ["trainer.max_steps=1000000", "trainer.max_epochs=null", "checkpoint.every_n_steps=50"]
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "trainer", "fit", *job, *endless],
        cwd=folder,
        env={**os.environ, **WAYS[way]},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        run = RunDirectory(_until(lambda: next((folder / "runs").glob("*-*"), None)))
        node = _until(lambda: run.launch().pid)
        _until(lambda: _all_train(run, ranks, 0))
        found = {"start, s": time.monotonic() - began, "start, CPU s": _cpu_s(child.pid)}
        _until(lambda: run.events_of(CheckpointSaved))
        before, killed = _cpu_s(node), time.monotonic()
        os.kill(_until(lambda: run.heartbeat(ranks - 1)).pid, signal.SIGKILL)
        _until(lambda: _all_train(run, ranks, 1))
        return {**found, "restart, s": time.monotonic() - killed, "restart, CPU s": _cpu_s(node) - before}
    finally:
        processes.kill_tree(child.pid)
        child.wait()


def _all_train(run: RunDirectory, ranks: int, attempt: int) -> bool:
    beats = [run.heartbeat(rank) for rank in range(ranks)]
    return all(beat is not None and beat.attempt == attempt and beat.phase == "train" for beat in beats)


def _cpu_s(pid: int) -> float:
    """Of `pid` and all below it, also of those that have ended and were waited for."""
    total = 0
    for one in [pid, *processes.descendants(pid)]:
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime: proc(5)
    return total * TICK_S


def _until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            sys.exit("the job did not get so far")
        time.sleep(0.02)
    return value


def table(found: dict[tuple[int, str], list[dict[str, float]]]) -> str:
    lines = [f"| ranks | ranks are | {' | '.join(MEASURES)} | rounds |", f"|{'---|' * (len(MEASURES) + 3)}"]
    for ranks in sorted({ranks for ranks, _ in found}):
        middle = {way: [statistics.median(one[name] for one in found[ranks, way]) for name in MEASURES] for way in WAYS}
        for way, values in middle.items():
            cells = " | ".join(f"{value:.1f}" for value in values)
            lines.append(f"| {ranks} | {way} | {cells} | {len(found[ranks, way])} |")
        ratios = " | ".join(f"{new / old:.2f}" for old, new in zip(*middle.values(), strict=True))
        lines.append(f"| {ranks} | second to first | {ratios} | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, action="append", help="default: 1, 2 and 4")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    chance = random.Random(0)
    for ranks in options.ranks or (1, 2, 4):
        for _ in range(options.rounds):
            for way in chance.sample(list(WAYS), len(WAYS)):
                with tempfile.TemporaryDirectory() as folder:
                    found.setdefault((ranks, way), []).append(measure(ranks, way, Path(folder)))
    text = table(found)
    print(text)
    if options.keep:
        keep("start", "The start of a job, and its restart", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
