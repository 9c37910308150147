"""What SLURM says of jobs: one squeue for all of them, and nothing that needs its accounting."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.slurm.commands import SlurmRefused, run


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """Job id to the long name of its state. A job that SLURM has forgotten, some minutes after its end, is left out.

    Raises EnvironmentFault when SLURM does not answer.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    try:
        printed = run("squeue", "--noheader", "--states=all", f"--jobs={','.join(wanted)}", "--format=%i|%T")
    except SlurmRefused:
        # Of one unknown id alone, or of unknown ids only, squeue says "Invalid job id specified".
        return {}
    return dict(line.split("|", 1) for line in printed.split())


def job(job_id: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty where SLURM has forgotten it."""
    try:
        printed = run("scontrol", "--oneliner", "show", "job", job_id)
    except SlurmRefused:
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", printed.splitlines()[0])) if printed.strip() else {}


def hostnames(nodelist: str) -> list[str]:
    """`node[0-1]` as names; the controller is not asked."""
    return run("scontrol", "show", "hostnames", nodelist).split()
