"""`trainer doctor`: check this machine, or every node of a short allocation on a cluster."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap

from trainer.cli.common import table
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.core import records
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, UserError
from trainer.core.text import one_line
from trainer.doctor.examine import Report, examine, probe_of
from trainer.doctor.finding import Finding
from trainer.doctor.run import worst

_DESCRIPTION = (
    "Check what training needs on this machine: drivers, GPUs, links, speed, storage, limits, network, clock, W&B and "
    "SLURM. Each line is ok, warning or error, with the command that fixes it. Measurements are compared with the "
    "hardware catalogue and with what this machine reached before. Exit code 3: there is an error. With "
    "cluster=slurm the checks run on every node of a short allocation, which cluster.* and resources.* describe as for "
    "a job."
)
_MARKS = {"ok": "ok", "skipped": "-", "warning": "warning", "error": "error"}
_NAME, _MARK = 15, 9


def main(argv: list[str]) -> int:
    """Run `trainer doctor`; returns 3 if there is an error."""
    parser = overrides_parser(
        "doctor",
        _DESCRIPTION,
        "trainer doctor",
        "trainer doctor cluster=slurm resources.nodes=4",
        sweeps=False,
    )
    parser.add_argument("--quick", action="store_true", help="skip measurements: import no torch, write nothing")
    parser.add_argument(
        "--new-baseline",
        action="store_true",
        help="forget what this machine reached before; what is measured now becomes the baseline",
    )
    parser.add_argument("--all", action="store_true", help="on a cluster, also print the checks that passed")
    parser.add_argument(
        "--wait", type=float, default=30.0, metavar="MINUTES", help="give up after this time in the queue (default: 30)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    arguments = parser.parse_intermixed_args(argv)
    composed = compose_all(arguments)
    if len(composed) != 1:
        raise UserError("trainer doctor: a sweep", "check one cluster at a time, without -m")
    config = composed[0].config
    choices = {"quick": arguments.quick, "new_baseline": arguments.new_baseline}
    if config["cluster"]["name"] == "slurm":
        from trainer.doctor.cluster import examine_nodes

        examined = examine_nodes(config, **choices, wait_s=60 * arguments.wait)
        found = [one for report in examined.nodes.values() for one in report.findings] + examined.across
        content = {
            "job": examined.job_id,
            "status": worst(found),
            "nodes": {node: records.to_json(report) for node, report in examined.nodes.items()},
            "across": [records.to_json(one) for one in examined.across],
        }
        text = of_nodes(examined.nodes, examined.across, arguments.all)
    else:
        report = examine(probe_of(config), **choices)
        found, content, text = report.findings, records.to_json(report), of_machine(report.findings)
    if arguments.json:
        json.dump(content, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(text)
    return ENVIRONMENT_MUST_CHANGE if worst(found) == "error" else DONE


def of_machine(findings: list[Finding]) -> str:
    """Return the findings as lines that fit the terminal, and a summary."""
    return "\n".join([*_lines(findings), "", _summary(findings)])


def of_nodes(nodes: dict[str, Report], across: list[Finding], with_good: bool) -> str:
    """Return the findings of each node, those of their comparison, and a table of the nodes."""
    lines = []
    for node, report in nodes.items():
        shown = [one for one in report.findings if with_good or one.status in ("warning", "error")]
        lines += [f"{one_line(node)}: {_summary(report.findings)}", *_lines(shown), ""]
    rows = [[node, *_cells(report)] for node, report in nodes.items()]
    header = ["node", "errors", "warnings", "matrix TFLOP/s", "all-reduce GB/s", "write MB/s"]
    return "\n".join([*lines, *_lines(across), *([""] if across else []), table(rows, header)])


def _cells(report: Report) -> list[str]:
    """Return the row of a node: the slowest of its devices."""

    def least(start: str, unit: float) -> str:
        values = [value for name, value in report.measured.items() if name.startswith(start)]
        return f"{min(values) / unit:.3g}" if values else ""

    matrix = least("matrix bf16", 1e12) or least("matrix fp16", 1e12) or least("cpu matrix fp32", 1e12)
    counts = [str(sum(one.status == status for one in report.findings)) for status in ("error", "warning")]
    reduced = least("all-reduce", 1e9) or least("cpu all-reduce", 1e9)
    return [*counts, matrix, reduced, least("storage write", 1e6)]


def _summary(findings: list[Finding]) -> str:
    counts = {status: sum(one.status == status for one in findings) for status in _MARKS}
    errors, warnings = counts["error"], counts["warning"]
    text = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}, {counts['ok']} ok"
    return f"{text}, {counts['skipped']} not checked"


def _lines(findings: list[Finding]) -> list[str]:
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    indent = " " * (_NAME + _MARK)
    lines = []
    for one in findings:
        head = f"{one.check:<{_NAME}}{_MARKS[one.status]:<{_MARK}}"
        lines += textwrap.wrap(
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
