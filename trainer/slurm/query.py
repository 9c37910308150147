"""Query jobs: one squeue for all of them, and nothing that needs SLURM's accounting."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.slurm.commands import SlurmRefused, run


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """Return the long name of the state of each job.

    A job that SLURM has purged, some minutes after its end, is left out.

    Raises:
        EnvironmentFault: SLURM does not respond.
    """
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    try:
        printed = run("squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%A|%i|%T")
    except SlurmRefused:
        # With unknown ids only, squeue fails with "Invalid job id specified".
        return {}
    found: dict[str, str] = {}
    for line in printed.split():
        job_id, name, state = [*line.split("|"), "", ""][:3]
        found |= {job_id: state, name: state}  # a task of a job array is named ARRAY_INDEX, and has an id of its own
    return found


def job(job_id: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`; empty when SLURM has purged the job."""
    try:
        printed = run("scontrol", "--oneliner", "show", "job", job_id)
    except SlurmRefused:
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", printed.splitlines()[0])) if printed.strip() else {}


def hostnames(nodelist: str) -> list[str]:
    """Expand a node list such as `node[0-1]`, without a call of the controller."""
    return run("scontrol", "show", "hostnames", nodelist).split()
