#!/usr/bin/env python3
"""What watching a run costs a step of about 20 ms: heartbeat, guard, step clock, ledger; and on two ranks the agreement
to stop, which is not a part of the target.

    .venv/bin/python benchmarks/overhead.py             one rank, then two; about seven minutes on two quiet cores
    .venv/bin/python benchmarks/overhead.py --keep      also writes benchmarks/results/overhead.md

One training of a small ResNet, in which the watching is switched on and off every two steps. Memory,
caches and processes are the same, and what else the machine does hits both; two trainings side by side differ by
more than what is looked for. Nothing is logged, which is the metrics' cost. The two halves without, compared among
themselves, tell what the measurement cannot see. Exit code 1 when the target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from allocator import ALLOCATOR
from kept import keep

HERE = Path(__file__).resolve().parent
TARGET = 1.003
ON = "on"
CASES = {"watching": False, "watching and agreeing": True}
"""Whether the ranks agree every second, as they do."""
TRIM = 0.05
"""Of the fours, at either end: the machine did something else there."""
TIMEOUT_S = 1800


def is_on(block: int) -> bool:
    """Whether the training is watched in this block: of each four in the outer or in the inner two, by chance, so that
    nothing that comes every so many steps falls into one kind only. Also for `overhead_case.py`."""
    four, place = divmod(block, 4)
    return (place in (0, 3)) != (random.Random(four).random() < 0.5)


def run_case(ranks: int, agrees: bool, rounds: int, count: int) -> list[list[float]]:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(HERE / "overhead_case.py")]
        command += [str(ranks), str(int(agrees)), str(rounds), str(count), folder]
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if ended.returncode:
            logs = "".join(path.read_text()[-4000:] for path in Path(folder).glob("*/*/rank-*.log"))
            sys.exit(f"{logs}\n{ended.stderr[-4000:]}")
        return list(json.loads((Path(folder) / "found.json").read_text()))


def summarise(costs: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of each four blocks those with over those without; and of the two without, first to second."""
    on: list[list[float]] = []
    off: list[list[float]] = []
    for blocks in costs:
        for first in range(0, len(blocks) - 3, 4):
            for watched, pairs in ((True, on), (False, off)):
                pairs.append([blocks[block] for block in range(first, first + 4) if is_on(block) == watched])
    ratio = _ratio([sum(pair) for pair in on], [sum(pair) for pair in off])
    on_us = sum(map(sum, on)) / len(on) / 2
    return {
        ON: {"cpu_us": on_us, **ratio},
        "off, first to second": {"cpu_us": on_us / ratio["ratio"], **_ratio(*map(list, zip(*off, strict=True)))},
    }


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Of the sums, because what happens once a second falls into few blocks; the error by the bootstrap."""
    pairs = list(zip(above, below, strict=True))
    draw = random.Random(0)
    again = [_of_sums(draw.choices(pairs, k=len(pairs))) for _ in range(300)]
    return {"ratio": _of_sums(pairs), "error": statistics.pstdev(again), "fours": len(pairs)}


def _of_sums(pairs: list[tuple[float, float]]) -> float:
    """Without the `TRIM` of them that are furthest out at either end."""
    cut = int(len(pairs) * TRIM)
    kept = sorted(pairs, key=lambda pair: pair[0] / pair[1])[cut : len(pairs) - cut]
    return sum(one for one, _ in kept) / sum(other for _, other in kept)


Found = dict[tuple[int, str], dict[str, dict[str, float]]]
"""By the number of ranks and the case, then by what is compared."""


def table(found: Found, loads: dict[tuple[int, str], str]) -> str:
    lines = [
        "| ranks | load | what | is | CPU us/step | CPU ratio | standard error | fours | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (ranks, case), rows in found.items():
        for name, row in rows.items():
            is_judged = name == ON and not CASES[case]
            verdict = f"{TARGET} {'met' if row['ratio'] <= TARGET else 'MISSED'}" if is_judged else ""
            lines.append(
                f"| {ranks} | {loads[ranks, case]} | {case} | {name} | {row['cpu_us']:.0f} | {row['ratio']:.4f} "
                f"| {row['error']:.4f} | {row['fours']} | {verdict} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(1, 2), action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=1, help="new processes each; default: 1")
    parser.add_argument("--blocks", type=int, default=2400, help="of two steps, a round; default: 2400")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    found: Found = {}
    loads: dict[tuple[int, str], str] = {}
    for ranks in options.ranks or (1, 2):
        for case, agrees in CASES.items():
            if ranks == 1 and agrees:
                continue
            before = os.getloadavg()[0]
            found[ranks, case] = summarise(run_case(ranks, agrees, options.rounds, options.blocks))
            loads[ranks, case] = f"{before:.1f}-{os.getloadavg()[0]:.1f}"
    text = table(found, loads)
    print(text)
    if options.keep:
        keep("overhead", "What watching a run costs", text, by_hand=True)
    return 0 if all(rows[ON]["ratio"] <= TARGET for (_, case), rows in found.items() if not CASES[case]) else 1


if __name__ == "__main__":
    sys.exit(main())
