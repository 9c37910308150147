"""Explain why a job is pending, with the numbers behind SLURM's reason."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

from trainer.slurm import query
from trainer.slurm.commands import SlurmRefused, number, run

_LIMIT = re.compile(r"([\w/]+)=(\d+(?:\.\d+)?)\((\d+(?:\.\d+)?)\)")
"""`node=1(1)`: the limit, and how much of it is used. N in place of a number means no limit."""
_SIMPLE = {
    "JobHeldUser": "held by its owner; `scontrol release {JobId}` releases it",
    "JobHeldAdmin": "held by an administrator of the cluster",
    "JobHoldMaxRequeue": "held by SLURM because it was requeued too often; `scontrol release {JobId}` releases it",
    "Licenses": "waiting for licenses ({Licenses})",
    "Reservation": "its reservation has not begun, or is full",
    "ReservationDeleted": "its reservation was deleted; submit it again without cluster.reservation",
    "InactiveLimit": "the partition {Partition} is inactive",
    "PartitionDown": "the partition {Partition} is down",
    "PartitionInactive": "the partition {Partition} starts no jobs now",
    "PartitionNodeLimit": "it requests more nodes ({NumNodes}) than the partition {Partition} allows or has up",
    "PartitionTimeLimit": "it requests more time ({TimeLimit}) than the partition {Partition} allows",
    "DependencyNeverSatisfied": "a job that it depends on has failed ({Dependency}): it will never start",
    "BadConstraints": "no node has the features that it requests ({Features})",
    "None": "SLURM has not considered it yet",
}
"""SLURM's reasons (man squeue, JOB REASON CODES) that need no further query."""


_LATEST_S = 10 * 365 * 86400
"""A start later than this is none."""


class _Fields(dict[str, str]):
    """Fields of a job; those that SLURM does not print are shown as a question mark."""

    def __missing__(self, key: str) -> str:
        return "?"


def explain(job_id: str) -> list[str]:
    """Return sentences, the reason first; empty when SLURM does not know the job."""
    job = _Fields(query.job(job_id))
    if not job:
        return []
    reason = job.get("Reason", "None")
    return [_sentence(reason, job), *_expected_start(reason, job)]


def _sentence(reason: str, job: dict[str, str]) -> str:
    name, _, rest = reason.partition(",")
    if name in _SIMPLE:
        return _SIMPLE[name].format_map(job)
    for start, explain_reason in _EXPLAINED.items():
        if name.startswith(start):
            return explain_reason(name, rest, job)
    return f"SLURM's reason is {reason}"


def _priority(name: str, rest: str, job: dict[str, str]) -> str:
    # One line for each task of an array, with the number of its job: without --array all tasks are one name.
    listed = run(
        *("squeue", "--noheader", "--array", "--states=PENDING", f"--partition={job['Partition']}", "--format=%A %Q")
    ).split()
    own = (-(number(job["Priority"]) or 0), number(job["JobId"]) or 0)
    pending = [(number(priority), number(job_id)) for job_id, priority in zip(listed[::2], listed[1::2], strict=False)]
    before = sum(
        (-priority, job_id) < own for priority, job_id in pending if priority is not None and job_id is not None
    )
    plural = "s are" if before != 1 else " is"
    return f"{before} job{plural} ahead of it in the partition {job['Partition']} (its priority is {-own[0]})"


def _resources(name: str, rest: str, job: dict[str, str]) -> str:
    states = run("sinfo", "--noheader", "--Node", f"--partition={job['Partition']}", "--format=%T").split()
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items()))
    return f"waiting for {_nodes(job)} of the partition {job['Partition']}, whose nodes are: {counts}"


def _nodes(job: dict[str, str]) -> str:
    nodes = job.get("NumNodes", "?").partition("-")[0]
    gpus = re.search(r"gres/gpu=(\d+)", job.get("TRES", "") + job.get("ReqTRES", ""))
    return _counted(nodes, "node") + (f" with {_counted(gpus[1], 'GPU')} in total" if gpus else "")


def _counted(count: str, noun: str) -> str:
    return f"{count} {noun}{'' if count == '1' else 's'}"


def _not_available(name: str, rest: str, job: dict[str, str]) -> str:
    which = re.search(r"UnavailableNodes:(\S+)", rest)
    text = _resources(name, rest, job)
    return text + (f"; not available: {which[1]}" if which else "")


def _begin_time(name: str, rest: str, job: dict[str, str]) -> str:
    left_s = (number(job.get("StartTime", "")) or 0.0) - time.time()
    again = " (SLURM delays a requeued job, by 2 minutes by default)" if job.get("Restarts", "0") != "0" else ""
    return f"it cannot start for another {max(0.0, left_s):.0f} s{again}"


def _dependency(name: str, rest: str, job: dict[str, str]) -> str:
    return f"waiting for other jobs: {job.get('Dependency', '')}"


def _limit(name: str, rest: str, job: dict[str, str]) -> str:
    if name.startswith("QOS"):
        what, arguments = f"QOS {job['QOS']}", ["flags=qos", f"qos={job['QOS']}"]
    else:
        what, arguments = f"account {job['Account']}", ["flags=assoc", f"accounts={job['Account']}"]
    try:
        shown = run("scontrol", "--oneliner", "show", "assoc_mgr", *arguments)
    except SlurmRefused:
        shown = ""
    limits = sorted(set(_limits(shown)))
    numbers = "; ".join(limits) or "you are not allowed to see its numbers"
    return f"a limit of the {what} is reached ({name}): {numbers}; the job requests {_nodes(job)}"


def _limits(shown: str) -> list[str]:
    """Return each limit that is set: `MaxTRESPU node is 1, used 1`."""
    limits = []
    for field in shown.split():
        name = field.partition("=")[0]
        for what, limit, used in _LIMIT.findall(field):
            limits.append(f"{name if what == name else f'{name} {what}'} is {limit}, used {used}")
    return limits


_EXPLAINED: dict[str, Callable[[str, str, dict[str, str]], str]] = {
    "Priority": _priority,
    "Resources": _resources,
    "ReqNodeNotAvail": _not_available,
    "Nodes_required_for_job_are_DOWN": _not_available,
    "BeginTime": _begin_time,
    "Dependency": _dependency,
    "QOS": _limit,
    "Assoc": _limit,
    "MaxJobsPer": _limit,
}
"""Prefix of a reason to the function that queries its numbers."""


def _expected_start(reason: str, job: dict[str, str]) -> list[str]:
    start = number(job.get("StartTime", ""))
    if reason == "BeginTime" or start is None:
        return []
    left_s = start - time.time()
    if not 0 < left_s < _LATEST_S:
        return []
    hours, minutes = divmod(int(left_s / 60), 60)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(start))
    wait = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else "less than a minute"
    return [f"SLURM expects it to start at {when}, in {wait}, if the jobs ahead of it use their whole time limit"]
