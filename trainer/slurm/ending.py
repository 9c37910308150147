"""Find out how SLURM ended an attempt, from the messages of slurmstepd in the job log."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.runs.cause import tail
from trainer.runs.directory import RunDirectory

_CANCELLED = re.compile(r"slurmstepd\S*: error: \*\*\* (STEP|JOB) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO (.+?))? \*\*\*")
"""Message of slurmstepd; SLURM's src/slurmd/slurmstepd/req.c and mgr.c."""
_BEGINS = "attempt {attempt} begins on "
TIME_LIMIT = "its time limit was reached"
_REASONS = {
    "PREEMPTION": "preempted by another job",
    "JOB REQUEUE": "requeued by scontrol",
    "NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS": "a node failed",
    "TIME LIMIT": TIME_LIMIT,
}


def beginning(attempt: int, nodes: Iterable[str]) -> str:
    """Return the line that marks the begin of an attempt in the job log; messages after it are about this attempt."""
    return _BEGINS.format(attempt=attempt) + " ".join(nodes)


def by_slurm(run: RunDirectory, job_id: str, attempt: int) -> str | None:
    """Return why SLURM ended this attempt; None when it did not."""
    lines = tail(run.logs_dir / f"slurm-{job_id}.log")
    starts = [index for index, line in enumerate(lines) if line.startswith(_BEGINS.format(attempt=attempt))]
    if not starts:
        return None
    for line in lines[starts[-1] :]:
        match = _CANCELLED.search(line)
        if match and match[2]:
            return _REASONS.get(match[2], match[2].lower())
        if match and match[1] == "JOB":  # a cancelled STEP was ended by srun, because it lost a node
            return "cancelled by scancel"
    return None
