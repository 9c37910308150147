"""How SLURM ended an attempt, from its own words in the job's log."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.runs.cause import tail
from trainer.runs.directory import RunDirectory

_CANCELLED = re.compile(r"slurmstepd\S*: error: \*\*\* (STEP|JOB) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO (.+?))? \*\*\*")
"""slurmstepd, into the job's log: src/slurmd/slurmstepd/req.c and mgr.c"""
_BEGINS = "attempt {attempt} begins on "
TIME_LIMIT = "its time limit was reached"
_REASONS = {
    "PREEMPTION": "preempted by another job",
    "JOB REQUEUE": "requeued by scontrol",
    "NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS": "a node failed",
    "TIME LIMIT": TIME_LIMIT,
}


def beginning(attempt: int, nodes: Iterable[str]) -> str:
    """The line with which an attempt begins in the job's log; what SLURM says after it is about that attempt."""
    return _BEGINS.format(attempt=attempt) + " ".join(nodes)


def by_slurm(run: RunDirectory, job_id: str, attempt: int) -> str | None:
    """Why SLURM ended this attempt, in words; null where it did not."""
    lines = tail(run.logs_dir / f"slurm-{job_id}.log")
    starts = [index for index, line in enumerate(lines) if line.startswith(_BEGINS.format(attempt=attempt))]
    if not starts:
        return None
    for line in lines[starts[-1] :]:
        match = _CANCELLED.search(line)
        if match and match[2]:
            return _REASONS.get(match[2], match[2].lower())
        if match and match[1] == "JOB":  # of a step: srun ended it, because a node had left
            return "cancelled by scancel"
    return None
