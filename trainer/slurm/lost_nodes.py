"""Record the nodes that a run has lost, and exclude them from its next allocations while there are others."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from trainer.core.errors import EnvironmentFault
from trainer.runs.directory import RunDirectory
from trainer.runs.events import NodeLost
from trainer.slurm import facts, query
from trainer.slurm.commands import SlurmRefused, patiently
from trainer.slurm.commands import run as call

_GONE = re.compile(r"DOWN|FAIL|NOT_RESPONDING|POWERED_DOWN|REBOOT")


def note_lost(run: RunDirectory, nodes: list[str]) -> dict[str, str]:
    """Write an event for each lost node of `nodes`; return node to its state."""
    lost = patiently(lambda: find(nodes))
    for node, state in lost.items():
        run.add_event(NodeLost(node=node, reason=state))
    return lost


def sentence(lost: dict[str, str]) -> str:
    """Describe the lost nodes; empty without any."""
    return "; ".join(f"{node} was lost ({state})" for node, state in lost.items())


def exclude(run: RunDirectory, job_id: str) -> None:
    """Exclude the lost nodes of this run from its requeued job, the latest first.

    Only as many as leave the partition more nodes than the job needs: nothing would undo the exclusion for a job
    that then waits for ever.
    """
    lost = list(dict.fromkeys(one.node for one in reversed(run.events_of(NodeLost))))
    if not lost:
        return
    config, shape = run.config(), run.shape()
    needed = shape.nodes + int(config["resources"]["spare_nodes"])
    given = config["cluster"]["exclude"]
    try:
        others = facts.usable_nodes(query.job(job_id).get("Partition", ""))
        others -= set(query.hostnames(given)) if given else set()
        excluded = [node for node in lost if len(others := others - {node}) > needed]
        if excluded:
            names = ",".join([*([given] if given else []), *excluded])
            call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}")
    except (SlurmRefused, EnvironmentFault) as error:
        print(f"cannot exclude the lost nodes: {error}", file=sys.stderr, flush=True)


def find(names: Iterable[str]) -> dict[str, str]:
    """Return those of `names` that are down, with SLURM's state and reason."""
    try:
        shown = call("scontrol", "--oneliner", "show", "node", ",".join(names))
    except SlurmRefused:
        return {}
    lost = {}
    for line in shown.splitlines():
        name, state = re.search(r"NodeName=(\S+)", line), re.search(r" State=(\S+)", line)
        if name and state and ("*" in state[1] or _GONE.search(state[1])):
            reason = re.search(r" Reason=(.+?)(?: \[|$)", line)
            lost[name[1]] = f"{state[1].lower()}" + (f", {reason[1]}" if reason else "")
    return lost
