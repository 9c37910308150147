"""Examine a node of an allocation: `python -m trainer.doctor.node FOLDER NODE...`.

Reads FOLDER/request.json and writes FOLDER/NODE.json: once with what this node finds by itself, and again when all
ranks of all nodes have exchanged data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.shape import LaunchShape
from trainer.core import records
from trainer.core.files import write_atomic
from trainer.doctor.examine import Report, examine, probe_of
from trainer.doctor.finding import error, ok, warning
from trainer.doctor.run import worst
from trainer.runs.records import Reduction
from trainer.slurm import preflight

REQUEST = "request.json"
_CHECK = "all nodes"
_TIMEOUT_S = 180.0
"""Seconds for which a node waits for the others, which measure meanwhile, and for the all-reduce."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every node is to do."""

    config: dict[str, Any]
    """The sections `runs_dir`, `tracking` and `cluster`."""
    shape: LaunchShape
    quick: bool
    new_baseline: bool


def main(folder: Path, nodes: Sequence[str]) -> int:
    """Examine this node and write the report."""
    request = records.read(Request, folder / REQUEST)
    assert request is not None
    node = os.environ.get("SLURMD_NODENAME") or nodes[0]
    path = folder / f"{node}.json"
    report = examine(probe_of(request.config), quick=request.quick, new_baseline=request.new_baseline)
    write_atomic(path, records.dumps(report, indent=1))
    if len(nodes) > 1 and not request.quick:
        together = preflight.Together(
            request.shape, list(nodes), node, request.config["cluster"].get("network_interface")
        )
        reduced = preflight.reduce_over(folder / "rendezvous.json", together, _TIMEOUT_S)
        write_atomic(path, records.dumps(_with_reduction(report, reduced, together), indent=1))
    return 0


def _with_reduction(report: Report, reduced: Reduction, together: preflight.Together) -> Report:
    """Return the report with a line about the all-reduce over all nodes."""
    world_size = together.shape.world_size
    if not reduced.bytes_per_s:
        fix = "see torch, NCCL and the GPUs of each node; cluster.network_interface names the interface between them"
        found = error(f"the ranks of all nodes cannot all-reduce: {reduced.complaint or 'a rank is missing'}", fix)
    else:
        text = f"{world_size} ranks on {len(together.nodes)} nodes all-reduce at {reduced.bytes_per_s / 1e9:.3g} GB/s"
        slow = preflight.slower(reduced, together)
        fix = "run it again; if it stays, compare the nodes: sudo dmesg, ibstat. --new-baseline accepts it"
        found = warning(f"{text}; {'; '.join(slow)}", fix) if slow else ok(text)
    findings = [*report.findings, replace(found, check=_CHECK)]
    values = {"all-reduce over all nodes": reduced.bytes_per_s} if reduced.bytes_per_s else {}
    return replace(report, findings=findings, status=worst(findings), measured={**report.measured, **values})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
