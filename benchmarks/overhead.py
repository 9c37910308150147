#!/usr/bin/env python3
"""What watching a run costs a step of about 20 ms: heartbeat, guard, step clock, ledger, agreement to stop.

    .venv/bin/python benchmarks/overhead.py             one rank, then two; about five minutes on two quiet cores
    .venv/bin/python benchmarks/overhead.py --keep      also writes benchmarks/results/overhead.md

The same job (a small ResNet), with all of it and with none, in processes that train blocks of steps in turn
(`parity_turns.py`). Nothing is logged in either, which is the metrics' cost. The job without trains twice: how far its
two ratios are from 1 is what the measurement cannot tell. Exit code 1 when the target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASE = "resnet"
BATCH = {1: 22, 2: 11}
"""Samples a rank, which take about 20 ms of CPU time on the machine that this was written on."""
TARGET = 1.005
TIMEOUT_S = 1800
CHILD = "--measure-in"
"""Of the process that imports torch; it writes its costs into a folder."""


def watched(on: bool, steps: int, pace: Any, folder: Path) -> None:
    """Train one rank as `trainer fit` does; `on` false: without what is measured here."""
    import torch
    from lightning.pytorch import Callback
    from parity_data import Batches
    from parity_variants import config_of

    from trainer.runs.directory import RunDirectory
    from trainer.worker import run
    from trainer.worker.heartbeat import Heartbeat
    from trainer.worker.process import Rank

    torch.set_num_threads(1)
    rank = Rank.from_environment()
    directory = RunDirectory(folder)
    for path in (directory.live_dir, directory.attempts_dir, directory.checkpoints_dir, directory.stop_request.parent):
        path.mkdir(parents=True, exist_ok=True)
    Batches.pace = pace
    config = config_of(CASE, steps, rank, folder)
    config.trainer.log_every_n_steps = 10**9
    heartbeat = Heartbeat(directory.live_dir / f"rank-{rank.rank}.json", rank)
    if on:
        heartbeat.start()
    else:
        config.resilience.on_nonfinite = "off"
        run.StepClock = lambda *arguments: Callback()  # type: ignore[assignment,misc]
    run._train(config, run.Attempt(directory, rank, heartbeat), run.init_process_group(config, rank))
    heartbeat.stop("finished")


def measure(ranks: int, rounds: int, count: int, folder: Path) -> None:
    """In the process that has imported all: {variant: [[cost of a block, ...] a round]} into `folder`."""
    from parity_data import CASES
    from parity_turns import Blocks, Train, in_turn, started

    from trainer.worker import run

    run.silence_known_warnings()
    CASES[CASE] = replace(CASES[CASE], batch_size=BATCH[ranks])
    blocks = Blocks(count, settle=1, measured=10)
    costs: dict[str, list[Any]] = {}
    for number in range(rounds):
        variants: dict[str, Train] = {
            name: partial(watched, name == "on", blocks.steps) for name in ("off", "on", "off again")
        }
        with started(variants, ranks, blocks, folder / str(number)) as running:
            for name, cost in in_turn(running, blocks).items():
                costs.setdefault(name, []).append(cost)
    (folder / "found.json").write_text(json.dumps(costs))


def run_case(ranks: int, rounds: int, count: int) -> dict[str, list[Any]]:
    """`measure` in a process of its own, with the allocator of `parity`."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, CHILD, folder]
        command += ["--ranks", str(ranks), "--rounds", str(rounds), "--blocks", str(count)]
        environment = {**os.environ, **allocator, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if ended.returncode:
            logs = "".join(path.read_text()[-4000:] for path in Path(folder).glob("*/*/rank-*.log"))
            sys.exit(f"{logs}\n{ended.stderr[-4000:]}")
        return dict(json.loads((Path(folder) / "found.json").read_text()))


def summarise(costs: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    """Each variant's CPU microseconds a step, and their ratio to the mean of the two without, block by block."""
    cpu = {name: [block[0] for blocks in rounds for block in blocks] for name, rounds in costs.items()}
    base = [statistics.mean(pair) for pair in zip(cpu["off"], cpu["off again"], strict=True)]
    rows = {}
    for name, values in cpu.items():
        ratios = [value / without for value, without in zip(values, base, strict=True)]
        rows[name] = {
            "cpu_us": statistics.median(values),
            "ratio": statistics.median(ratios),
            # Of a median of nearly normal values: 1.25 times that of the mean.
            "error": 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5,
            "blocks": len(values),
        }
    return rows


def table(found: dict[int, dict[str, dict[str, float]]], loads: dict[int, str]) -> str:
    lines = [
        "| ranks | load | watching | CPU us/step | CPU ratio | standard error | blocks | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, rows in found.items():
        for name, row in rows.items():
            verdict = f"{TARGET} {'met' if row['ratio'] <= TARGET else 'MISSED'}" if name == "on" else ""
            lines.append(
                f"| {ranks} | {loads[ranks]} | {name} | {row['cpu_us']:.0f} | {row['ratio']:.4f} | {row['error']:.4f} "
                f"| {row['blocks']} | {verdict} |"
            )
    return "\n".join(lines)


def keep(text: str) -> None:
    import torch

    commit = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    facts = {
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
    }
    said = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    path = HERE / "results" / "overhead.md"
    path.write_text(f"# What watching a run costs\n\n`benchmarks/overhead.py`\n\n{said}\n\n{text}\n")
    print(f"kept in {path}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(1, 2), action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=2, help="new processes each; default: 2")
    parser.add_argument("--blocks", type=int, default=80, help="measured turns of 10 steps a round; default: 80")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    parser.add_argument(CHILD, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_in:
        measure(options.ranks[0], options.rounds, options.blocks, options.measure_in)
        return 0
    found, loads = {}, {}
    for ranks in options.ranks or (1, 2):
        before = os.getloadavg()[0]
        found[ranks] = summarise(run_case(ranks, options.rounds, options.blocks))
        loads[ranks] = f"{before:.1f}-{os.getloadavg()[0]:.1f}"
    text = table(found, loads)
    print(text)
    if options.keep:
        keep(text)
    return 0 if all(rows["on"]["ratio"] <= TARGET for rows in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
