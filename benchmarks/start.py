#!/usr/bin/env python3
"""How long a job takes to its first step, and again after a rank was killed: ranks forked from a process that has
imported what they need (`trainer/supervise/agent.py`), and ranks that each import for themselves. Also the parts of the
start, and the files that it opens.

    .venv/bin/python benchmarks/start.py             one, two and four ranks; about six minutes on two quiet cores
    .venv/bin/python benchmarks/start.py --keep      also writes benchmarks/results/start.md

The ways take turns, in an order by chance. Counted is from the command to the end of the first step (`first_step` in
`events.jsonl`), and from the kill to the end of the first step of the next attempt; CPU time is of all processes of the
job at that moment.

Files are counted by `strace` (`apt-get install strace`) in one more job of two ranks each way; in a third, each open is
delayed by 5 ms, as on a slow shared file system. Without `strace` this part is left out.

Bytecode is cached, as on a user's machine: a job that is not counted writes it, whatever PYTHONDONTWRITEBYTECODE says.
Exit code 1 when a goal for two forked ranks is missed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
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
from trainer.runs.events import CheckpointSaved, FirstStep
from trainer.runs.starts import starts

WAYS = {"each imports": {"TRAINER_PRELOAD": ""}, "forked": {}}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
TIMEOUT_S = 300.0
MEASURES = ("start, s", "start, CPU s", "restart, s", "restart, CPU s")
GOALS = {"start, s": 4.0, "restart, s": 1.5}
"""Most seconds on two forked ranks: two are the quickstart's default on a machine without a GPU."""

DELAY_S = 0.005
"""Of an open in the traced job."""
_CALL = re.compile(r"([0-9.]+) (\w+)\((?:AT_FDCWD, |\d+, )?(?:\"([^\"]*)\")?")
_LOOKUPS = ("newfstatat", "stat", "lstat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat")


def command(ranks: int) -> list[str]:
    job = ["experiment=quickstart", "tracking=none", "resources.gpus=0", f"resources.cpu_processes={ranks}"]
    endless = ["trainer.max_steps=1000000", "trainer.max_epochs=null", "checkpoint.every_n_steps=50"]
    return [sys.executable, "-m", "trainer", "fit", *job, *endless]


def environment(way: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**own, **WAYS[way]}


def measure(ranks: int, way: str, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """One job: its start, one rank killed, its restart. Seconds by `MEASURES`, and seconds of the start by part."""
    began = time.time()
    child = subprocess.Popen(
        command(ranks),
        cwd=folder,
        env=environment(way),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        run = RunDirectory(_until(lambda: next((folder / "runs").glob("*-*"), None)))
        node = _until(lambda: run.launch().pid)
        first = _until(lambda: run.events_of(FirstStep))[0]
        found = {"start, s": first.time - began, "start, CPU s": _cpu_s(child.pid)}
        _until(lambda: run.events_of(CheckpointSaved))
        victim = _until(lambda: run.heartbeat(ranks - 1)).pid
        before, killed = _cpu_s(node), time.time()
        os.kill(victim, signal.SIGKILL)
        again = _until(lambda: run.events_of(FirstStep)[1:])[0]
        found |= {"restart, s": again.time - killed, "restart, CPU s": _cpu_s(node) - before}
        return found, starts(run)[0]["seconds"]
    finally:
        processes.kill_tree(child.pid)
        child.wait()


def traced(ranks: int, way: str, folder: Path, delay_s: float = 0.0) -> tuple[float, dict[str, list[int]]]:
    """A job until its first step, under strace: its seconds, and the calls of each process (`_counted`)."""
    traces = folder / "traces"
    traces.mkdir()
    tracer = ["strace", "-ff", "-ttt", "-q", "-s", "400", "-e", "trace=%file", "-e", "signal=none"]
    tracer += ["-e", f"inject=open,openat:delay_enter={delay_s * 1e6:.0f}"] if delay_s else []
    began = time.time()
    child = subprocess.Popen(
        [*tracer, "-o", str(traces / "of"), *command(ranks)],
        cwd=folder,
        env=environment(way),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        run = RunDirectory(_until(lambda: next((folder / "runs").glob("*-*"), None)))
        first = _until(lambda: run.events_of(FirstStep))[0]
    finally:
        processes.kill_tree(child.pid)
        child.wait()
    counted: dict[str, list[int]] = {}
    for trace in traces.iterdir():
        name, calls = _counted(trace.read_text(errors="replace").splitlines(), first.time)
        counted[name] = [sum(pair) for pair in zip(counted.get(name, [0] * len(calls)), calls, strict=True)]
    return first.time - began, counted


def files(ranks: int) -> str:
    """A table of the calls that name a file until the first step, by process, and the time with slow opens."""
    lines = [
        "| ranks are | process | opens | of them in /proc, /sys, /dev | in the run directory | other lookups |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            _, counted = traced(ranks, way, Path(folder))
        counted["all"] = [sum(column) for column in zip(*counted.values(), strict=True)]
        lines += [f"| {way} | {name} | {' | '.join(f'{one:,}' for one in counted[name])} |" for name in sorted(counted)]
    with tempfile.TemporaryDirectory() as folder:
        slow_s, _ = traced(ranks, "forked", Path(folder), DELAY_S)
    lines += ["", f"With {DELAY_S * 1000:g} ms more per open, forked ranks end their first step after {slow_s:.1f} s."]
    return f"Files until the first step of {ranks} ranks:\n\n" + "\n".join(lines)


def _counted(lines: list[str], until: float) -> tuple[str, list[int]]:
    """Which process this trace is of; its opens, those in the kernel's and in the run directory, its other lookups."""
    name, calls = "others: threads, git, torchrun", [0, 0, 0, 0]
    for line in lines:
        call = _CALL.match(line)
        if call is None or float(call[1]) > until:
            continue
        path = call[3] or ""
        if call[2] == "execve":
            roles = {"fit": "command", "supervise.ahead": "node process", "agent.py": "fork server"}
            name = next((role for mark, role in roles.items() if mark in line), name)
        elif call[2] in ("open", "openat"):
            calls[0] += 1
            calls[1] += path.startswith(("/proc/", "/sys/", "/dev/"))
            calls[2] += "/runs/quickstart-" in path
            if rank := re.search(r"logs/attempt-00/rank-(\d+)\.log", path):
                name = f"rank {rank[1]}" if name.startswith("others") else name
        elif call[2] in _LOOKUPS:
            calls[3] += 1
    return name, calls


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


def verdict(found: dict[tuple[int, str], list[dict[str, float]]]) -> tuple[str, bool]:
    """Compare two forked ranks with the goals; returns a line, and whether all are met."""
    rows = found.get((2, "forked"))
    if rows is None:
        return "The goals are for two ranks, which were not run.", True
    values = {name: statistics.median(row[name] for row in rows) for name in GOALS}
    is_met = {name: values[name] <= goal for name, goal in GOALS.items()}
    said = [
        f"{name.removesuffix(', s')} {values[name]:.2f} s (goal {goal:g} s {'met' if is_met[name] else 'MISSED'})"
        for name, goal in GOALS.items()
    ]
    return f"Two forked ranks: {', '.join(said)}.", all(is_met.values())


def parts_table(parts: dict[int, list[dict[str, float]]]) -> str:
    """The median seconds of each part of the start of forked ranks."""
    names = list(dict.fromkeys(name for rows in parts.values() for row in rows for name in row))
    lines = [f"| ranks | {' | '.join(name.replace('_', ' ') for name in names)} |", f"|{'---|' * (len(names) + 1)}"]
    for ranks, rows in sorted(parts.items()):
        cells = [f"{statistics.median(row.get(name, 0.0) for row in rows):.2f}" for name in names]
        lines.append(f"| {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, action="append", help="default: 1, 2 and 4")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(1, "forked", Path(folder))
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    parts: dict[int, list[dict[str, float]]] = {}
    chance = random.Random(0)
    for ranks in options.ranks or (1, 2, 4):
        for _ in range(options.rounds):
            for way in chance.sample(list(WAYS), len(WAYS)):
                with tempfile.TemporaryDirectory() as folder:
                    seconds, of_start = measure(ranks, way, Path(folder))
                found.setdefault((ranks, way), []).append(seconds)
                if way == "forked":
                    parts.setdefault(ranks, []).append(of_start)
    judged, met = verdict(found)
    text = f"Load {os.getloadavg()[0]:.1f} at the end of the rounds.\n\n{table(found)}\n\n{judged}\n\n"
    text += f"The parts of the start of forked ranks, seconds:\n\n{parts_table(parts)}"
    if shutil.which("strace"):
        text += f"\n\n{files(2)}"
    print(text)
    if options.keep:
        keep("start", "The start of a job, and its restart", text, by_hand=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
