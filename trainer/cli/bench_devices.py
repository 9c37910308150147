"""`trainer bench devices`: the same step on the CPU and on each GPU of this machine."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import textwrap
from dataclasses import asdict
from pathlib import Path

from trainer.cli.common import table
from trainer.cli.job import check_all
from trainer.cli.options import make_parser
from trainer.config.compose import compose
from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.core.files import write_atomic
from trainer.core.gpus import inventory
from trainer.core.hardware import usable_cores
from trainer.core.near import did_you_mean, listed
from trainer.core.text import one_line
from trainer.doctor.bars import bars
from trainer.doctor.devices import Row, cases, log, measure
from trainer.runs.environment_report import report as environment

_DESCRIPTION = (
    "Train the same job for a few steps on the CPU with one and two ranks, on each GPU, and on all GPUs, in each "
    "precision and strategy of this machine, at the same global batch; print samples per second as a table, and draw "
    "them. Without overrides the job is a perceptron of 4 million parameters on digits. Exit code 1: a job failed."
)
_JOB = ["experiment=quickstart", "model.hidden=[2048,2048]", "data.batch_size=256"]
_STRATEGIES = ("ddp", "fsdp", "hsdp", "tp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")


def main(argv: list[str]) -> int:
    """Run `trainer bench devices`; returns 1 if a job failed."""
    parser = make_parser(
        "bench devices",
        _DESCRIPTION,
        "trainer bench devices",
        "trainer bench devices experiment=text_transformer --out devices",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of the job")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps to measure (default: 10)")
    parser.add_argument(
        "--strategies", default="ddp,fsdp", metavar="A,B", help="strategies of several ranks (default: ddp,fsdp)"
    )
    parser.add_argument("--out", metavar="FILE", help="write FILE.json, FILE.md and FILE.svg")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    arguments = parser.parse_intermixed_args(argv)
    strategies = arguments.strategies.split(",")
    for name in strategies:
        if name not in _STRATEGIES:
            fix = f"{did_you_mean(name, _STRATEGIES)}use one of: {listed(_STRATEGIES)}"
            raise UserError(f"--strategies: unknown strategy {name}", fix)
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps}: too few", "write --steps 1 or more")
    free = [gpu for gpu in inventory().gpus if not gpu.holder and not gpu.is_mig]
    overrides = [*(arguments.overrides or _JOB), "tracking=none"]
    todo = cases(free, usable_cores(), strategies)
    check_all([compose([*overrides, *todo[0].overrides], config_dirs=[])])  # a mistake in it would be one in every row
    if arguments.out:
        refuse_unwritable(Path(arguments.out))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trainer-devices-") as folder:
        for number, case in enumerate(todo):
            log(f"{number + 1} of {len(todo)}: {case.label}")
            job = [*overrides, f"runs_dir={folder}"]
            rows.append(measure(case, job, arguments.steps, rows[0] if rows else None))
            if rows[-1].problem:
                log(f"  {rows[-1].problem}")
    content = {"job": overrides, "steps": arguments.steps, "rows": [asdict(row) for row in rows], **_machine()}
    if arguments.json:
        json.dump(content, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(text_of(rows))
    if arguments.out:
        write(Path(arguments.out), rows, overrides, json.dumps(content, indent=1))
    return JOB_FAILED if any(row.problem for row in rows) else DONE


def refuse_unwritable(path: Path) -> None:
    """Refuse a place for the results before minutes are spent on them.

    Raises:
        UserError: The folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}", "choose a folder that you may write to") from error


def text_of(rows: list[Row]) -> str:
    """Return the table, the failures, and a note where other programs disturbed the measurement."""
    cells = [
        [
            row.device,
            str(row.ranks),
            row.strategy,
            row.precision,
            f"{1e3 * row.step_s:.1f}" if row.step_s else "failed",
            f"{row.samples_s:.4g}" if row.samples_s else "",
            f"{row.speedup:.2f}" if row.speedup else "",
        ]
        for row in rows
    ]
    lines = [table(cells, ["device", "ranks", "strategy", "precision", "ms per step", "samples/s", "speed-up"])]
    lines += [f"{row.label}: {one_line(row.problem)}" for row in rows if row.problem]
    busy = [row.label for row in rows if row.is_busy]
    if busy:
        text = f"other programs used the CPU during: {'; '.join(busy)}"
        lines += textwrap.wrap(text, shutil.get_terminal_size((100, 24)).columns, subsequent_indent="  ")
    return "\n".join(lines)


def plot(rows: list[Row]) -> str:
    """Return the chart of the rows that were measured."""
    shown = [(row.label, row.device, row.samples_s, f"{row.samples_s:.4g} ({row.speedup:.2f}x)")
             for row in rows if row.samples_s and row.speedup]  # fmt: skip
    return bars("The same step on each device", "samples per second", shown)


def write(path: Path, rows: list[Row], overrides: list[str], content: str) -> None:
    """Write the results as JSON, as a page, and as a chart.

    Raises:
        OSError: A file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = _machine()["machine"]
    page = [
        "# The same step on each device",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; `{' '.join(overrides)}`.",
        "",
        f"![Samples per second]({path.name}.svg)",
        "",
        "```",
        text_of(rows),
        "```",
        "",
    ]
    for suffix, text in ((".json", content + "\n"), (".md", "\n".join(page)), (".svg", plot(rows))):
        write_atomic(path.with_name(path.name + suffix), text)


def _machine() -> dict[str, dict[str, object]]:
    known = environment()
    packages = {name: known["packages"].get(name) for name in ("torch", "lightning")}
    return {"machine": {**known["machine"], "gpus": known["gpus"], "trainer": known["trainer"], **packages}}
