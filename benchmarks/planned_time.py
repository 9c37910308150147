"""Planned against measured step time for ten CPU jobs of about a minute: `python benchmarks/planned_time.py`.

Each job is planned after two measurements of some seconds, of the same model with half and with twice the global batch,
and is then measured by `trainer time`: the mean over all of its steps, ends of epochs included. Ranks have one thread,
and the clock is its CPU time: other processes on the machine do not stop it. The last column is the median of a step by
the wall clock, which also has the time in which ranks wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import COMMIT, HERE, keep

LIMIT = 0.2
KEPT = HERE / "results" / "planned_time.json"


@dataclass(frozen=True)
class Case:
    """A job of the table."""

    name: str
    overrides: tuple[str, ...]
    batch: int
    ranks: int = 1
    calibrating_steps: int = 40
    """Steps of a measurement before: a few seconds, and at least an epoch of small jobs."""


_DIGITS = ("data=digits", "optimizer=adamw")
_TEXT = ("experiment=text_transformer",)
CASES = [
    Case("mlp", ("model=mlp", *_DIGITS), 64, calibrating_steps=3000),
    Case("wide mlp, ddp", ("model=mlp", "model.hidden=[1024,1024]", *_DIGITS), 256, 2, 150),
    Case("resnet", ("model=resnet_small", *_DIGITS), 16, calibrating_steps=400),
    Case("vgg", ("model=vgg_small", *_DIGITS), 32, calibrating_steps=400),
    Case("vit", ("model=vit_small", "model.patch=2", *_DIGITS), 32, calibrating_steps=150),
    Case("transformer", _TEXT, 4),
    Case("transformer, ddp", _TEXT, 8, 2),
    Case("transformer, fsdp", (*_TEXT, "strategy=fsdp"), 8, 2),
    Case("transformer, checkpointing", (*_TEXT, "strategy.activation_checkpointing=full"), 4),
    Case("wide transformer, accumulated", (*_TEXT, "model.dim=512", "data.micro_batch=2"), 4),
]


def main() -> int:
    """Measure the cases and print the table; returns 1 if a planned time is further off than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a measured job (default: 60)")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases, from 0")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="write the table to benchmarks/results/planned_time.md, with the kept rows of the cases not chosen",
    )
    arguments = parser.parse_args()
    rows = {}
    chosen = range(len(CASES)) if arguments.only is None else arguments.only
    with tempfile.TemporaryDirectory() as folder:
        for number in chosen:
            row = _row(CASES[number], Path(folder), arguments.seconds)
            rows[row["name"]] = row
            print(row, flush=True)
            if arguments.keep:  # each at once: the next may be interrupted
                _keep(rows)
    if not arguments.keep:
        print("\n".join(_table(list(rows.values()))))
    return int(any(abs(row["error"]) > LIMIT for row in rows.values()))


def _keep(new: dict[str, dict[str, Any]]) -> None:
    """Merge rows into the kept ones, and write the table of all."""
    kept = {row["name"]: row for row in json.loads(KEPT.read_text())} if KEPT.exists() else {}
    kept |= new
    rows = [kept[case.name] for case in CASES if case.name in kept]
    KEPT.write_text(json.dumps(rows, indent=1) + "\n")
    keep("planned_time", "Planned against measured step time on CPU ranks", "\n".join(_table(rows)))


def _row(case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    (folder / str(os.getpid())).mkdir(exist_ok=True)
    before = [_time(case, batch, case.calibrating_steps, folder) for batch in (case.batch // 2, case.batch * 2)]
    rough = sum(one["calibrating_s"] for one in before) / 2
    report = _time(case, case.batch, max(10, round(seconds / rough)), folder)
    planned = report["planned"]
    return {
        "name": case.name,
        "commit": COMMIT,
        "seconds": seconds,
        "ranks": case.ranks,
        "batch": case.batch,
        "steps": report["steps"],
        "uncalibrated": before[0]["planned"]["step_s"] / before[0]["calibrating_s"] - 1,
        "planned_s": planned["step_s"],
        "stated": planned["error"],
        "measured_s": report["mean_cpu_s"],
        "wall_s": report["step_s"],
        "error": planned["step_s"] / report["mean_cpu_s"] - 1,
    }


def _time(case: Case, batch: int, steps: int, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / case.name), "OMP_NUM_THREADS": "1"}
    shape = ["resources.gpus=0", f"resources.cpu_processes={case.ranks}", f"data.batch_size={batch}"]
    command = [sys.executable, "-m", "trainer", "time", *case.overrides, *shape, "--json", "--warmup", "10"]
    done = subprocess.run(
        [*command, "--steps", str(steps)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _table(rows: list[dict[str, Any]]) -> list[str]:
    titles = "job, ranks, batch, steps, commit, planned, measured, error, stated error, first plan, by the clock"
    columns = titles.split(", ")
    lines = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [
            *(row["name"], row["ranks"], row["batch"], row["steps"], row["commit"]),
            *(f"{row[key] * 1000:.2f} ms" for key in ("planned_s", "measured_s")),
            f"{row['error']:+.1%}",
            "not known" if row["stated"] is None else f"{row['stated']:.0%}",
            f"{row['uncalibrated']:+.0%}",
            f"{row['wall_s'] * 1000:.2f} ms",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    within = sum(abs(row["error"]) <= LIMIT for row in rows)
    lines += ["", f"{within} of {len(rows)} within {LIMIT:.0%}. First plan: of half the batch, before any measurement."]
    return lines


if __name__ == "__main__":
    sys.exit(main())
