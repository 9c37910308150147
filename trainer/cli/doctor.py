"""`trainer doctor`: check this machine, or every node of a short allocation on a cluster."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.cli.overrides import compose_all, overrides_parser
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, UserError
from trainer.core.text import one_line
from trainer.doctor.finding import Finding
from trainer.doctor.measuring import measured
from trainer.doctor.probe import Probe, this_machine
from trainer.doctor.run import run_all, worst
from trainer.doctor.speed import measurements
from trainer.hardware import baseline

_DESCRIPTION = (
    "Check what training needs on this machine: drivers, GPUs, links, speed, storage, limits, network, clock, W&B and "
    "SLURM. Each line says ok, warning or error, and the command that mends it. Measurements are held against the "
    "hardware catalogue and against what this machine reached before. Exit code 3: there is an error. With "
    "cluster=slurm the checks run on every node of a short allocation, which the same options describe as those of a "
    "job."
)
_MARKS = {"ok": "ok", "skipped": "-", "warning": "warning", "error": "error"}
_NAME, _MARK = 15, 9


def main(argv: list[str]) -> int:
    """Run `trainer doctor`; returns 3 if there is an error."""
    parser = overrides_parser(
        "doctor",
        _DESCRIPTION,
        "trainer doctor",
        "trainer doctor cluster=slurm resources.nodes=4 resources.gpus_per_node=8",
    )
    parser.add_argument("--quick", action="store_true", help="without measurements: no torch, nothing is written")
    parser.add_argument(
        "--new-baseline",
        action="store_true",
        help="forget what this machine reached before; what is measured now becomes the baseline",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    arguments = parser.parse_intermixed_args(argv)
    composed = compose_all(arguments)
    if len(composed) != 1:
        raise UserError("trainer doctor: a sweep", "check one cluster at a time, without -m")
    config = composed[0].config
    probe = from_config(config)
    findings, probe = examine(probe, arguments.quick, arguments.new_baseline)
    if arguments.json:
        json.dump(as_json(findings, probe), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(report(findings))
    return ENVIRONMENT_MUST_CHANGE if worst(findings) == "error" else DONE


def from_config(config: dict[str, Any]) -> Probe:
    """Return the probe of this machine for the runs of a configuration."""
    from dataclasses import replace

    probe = this_machine(Path(config["runs_dir"]).expanduser())
    tracking = config["tracking"]
    mode = tracking["mode"] if tracking["name"] == "wandb" else "disabled"
    return replace(probe, tracking_mode=mode, is_on_slurm=config["cluster"]["name"] == "slurm")


def examine(probe: Probe, quick: bool, new_baseline: bool) -> tuple[list[Finding], Probe]:
    """Measure unless `quick`, run all checks, and keep the measurements as the baseline of this machine."""
    from dataclasses import replace

    if not quick:
        probe = measured(probe)
        if new_baseline and probe.baseline is not None:
            probe = replace(probe, baseline=replace(probe.baseline, samples={}))
    findings = run_all(probe)
    if probe.baseline is not None:
        try:
            baseline.write(probe.baseline.with_measured(measurements(probe)))
        except OSError as problem:
            text = f"what was measured cannot be kept for comparison: {problem.strerror}"
            fix = "set XDG_CACHE_HOME to a folder that you may write to"
            findings.append(Finding(check="baseline", status="warning", text=text, fix=fix))
    return findings, probe


def as_json(findings: list[Finding], probe: Probe) -> dict[str, Any]:
    """Return the report as plain data."""
    usual = {} if probe.baseline is None else {name: probe.baseline.usual(name) for name in probe.baseline.samples}
    return {
        "host": probe.hostname(),
        "status": worst(findings),
        "findings": [asdict(one) for one in findings],
        "measured": measurements(probe),
        "usual": usual,
    }


def report(findings: list[Finding], only_bad: bool = False) -> str:
    """Return the findings as lines that fit the terminal, and a summary."""
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    lines = []
    for one in findings:
        if not only_bad or one.status in ("warning", "error"):
            lines += _lines(one, width)
    counts = {status: sum(one.status == status for one in findings) for status in _MARKS}
    errors, warnings = counts["error"], counts["warning"]
    summary = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}, {counts['ok']} ok"
    return "\n".join([*lines, "", f"{summary}, {counts['skipped']} not checked"])


def _lines(one: Finding, width: int) -> list[str]:
    indent = " " * (_NAME + _MARK)
    head = f"{one.check:<{_NAME}}{_MARKS[one.status]:<{_MARK}}"
    lines = textwrap.wrap(
        one_line(one.text), width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
    )
    # A command is copied, so its words stay whole.
    lines += textwrap.wrap(
        one_line(one.fix),
        width,
        initial_indent=f"{indent}-> ",
        subsequent_indent=f"{indent}   ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return lines
