"""Compare SLURM's view of this machine with its real cores, memory and GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.host import numbers
from trainer.doctor.probe import Probe

_BAD_STATES = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "INVAL")
_LEAST_OF_MEMORY = 0.9


def controller(probe: Probe) -> Iterator[Finding]:
    """Check that SLURM answers, and which of its nodes do not work."""
    ping = probe.run(("scontrol", "ping"))
    if ping.code == 127:
        yield skipped("SLURM is not installed here")
        return
    if ping.code or " UP" not in ping.out:
        said = (ping.out or ping.errors).strip().splitlines()
        text = f"the controller does not answer: {said[0] if said else 'no output'}"
        if probe.is_on_slurm or "SLURM_JOB_ID" in probe.environment:
            yield error(text, "wait, or tell the administrator; `systemctl status slurmctld` on the controller")
        else:  # commands of SLURM without a cluster, as on a laptop
            yield skipped(f"{text}; jobs run on this machine", "trainer doctor cluster=slurm, to use a cluster")
        return
    broken = probe.run(("sinfo", "--noheader", "--list-reasons", "--format=%n|%T|%E")).out.split("\n")
    nodes = [line.split("|") for line in broken if line.count("|") == 2]
    if nodes:
        text = "; ".join(f"{name} {state}: {reason}" for name, state, reason in nodes[:3])
        more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
        fix = f"sudo scontrol update nodename={nodes[0][0]} state=resume, once its reason is gone"
        yield warning(f"{text}{more}", fix)
    else:
        yield ok("the controller answers, no node is down or drained")


def node(probe: Probe) -> Iterator[Finding]:
    """Check SLURM's cores, memory and GPUs of this node against those that are there."""
    name = probe.environment.get("SLURMD_NODENAME", "")
    if not name:
        yield skipped("not inside of a job")
        return
    shown = probe.run(("scontrol", "--oneliner", "show", "node", name))
    fields = dict(re.findall(r"(\w+)=(\S*)", shown.out))
    if not fields:
        yield skipped("SLURM does not describe this node", f"scontrol show node {name}")
        return
    is_good = True
    for finding in (*_state(name, fields), *_sizes(probe, fields), *_gpus(probe, fields), *_share(probe)):
        is_good = False
        yield finding
    if is_good:
        yield ok(f"{name}: {fields.get('CPUTot', '?')} cores, {fields.get('RealMemory', '?')} MB, as here")


def _state(name: str, fields: dict[str, str]) -> Iterator[Finding]:
    state = fields.get("State", "")
    if any(bad in state for bad in _BAD_STATES):
        reason = fields.get("Reason", "no reason given")
        yield warning(f"{name} is {state} ({reason})", f"sudo scontrol update nodename={name} state=resume")


def _sizes(probe: Probe, fields: dict[str, str]) -> Iterator[Finding]:
    there = len(numbers(probe.read("sys/devices/system/cpu/online")))
    cores = int(fields["CPUTot"]) if fields.get("CPUTot", "").isdigit() else 0
    if there and cores > there:
        fix = "slurmd -C prints what slurm.conf should say"
        yield error(f"SLURM gives this node {cores} cores, it has {there}: ranks share cores", fix)
    total = re.search(r"MemTotal:\s+(\d+) kB", probe.read("proc/meminfo"))
    memory = int(fields["RealMemory"]) if fields.get("RealMemory", "").isdigit() else 0
    if total and memory * 1024 > int(total[1]):
        fix = "slurmd -C prints what slurm.conf should say"
        yield error(f"SLURM gives this node {memory} MB, it has {int(total[1]) // 1024} MB: jobs are killed", fix)
    elif total and memory > 1 and memory * 1024 < (1 - _LEAST_OF_MEMORY) * int(total[1]):
        fix = "slurmd -C prints what slurm.conf should say"
        yield warning(f"SLURM knows of {memory} of {int(total[1]) // 1024} MB", fix)


def _gpus(probe: Probe, fields: dict[str, str]) -> Iterator[Finding]:
    """Compare the GPUs of the job's share of this node with those that a process of it sees."""
    granted = probe.environment.get("SLURM_GPUS_ON_NODE", "")
    usable = probe.gpus.most
    if granted.isdigit() and int(granted) > usable:
        why = f" ({probe.gpus.problem.message})" if probe.gpus.problem else ""
        fix = "nvidia-smi -L on the node; gres.conf and cgroup.conf (ConstrainDevices) must name the same devices"
        yield error(f"SLURM allocated {granted} GPUs of this node, {usable} can be used{why}", fix)
    of_node = re.search(r"gpu(?::[^:,(]+)?:(\d+)", fields.get("Gres", ""))
    if not granted and of_node and probe.gpus.gpus and "CUDA_VISIBLE_DEVICES" not in probe.environment:
        text = f"this job requested no GPU, and {usable} can be used"
        yield warning(text, "ConstrainDevices=yes in cgroup.conf keeps jobs from the GPUs of others")


def _share(probe: Probe) -> Iterator[Finding]:
    granted = probe.environment.get("SLURM_CPUS_ON_NODE", "")
    bound = len(probe.affinity())
    if not granted.isdigit():
        return
    if bound < int(granted):
        yield warning(
            f"SLURM allocated {granted} cores, this process is bound to {bound}",
            "srun --cpus-per-task=N passes them on (srun does not inherit it from sbatch)",
        )
    elif bound > int(granted):
        text = f"SLURM allocated {granted} cores, this process may use {bound}: jobs disturb each other"
        yield warning(text, "TaskPlugin=task/affinity,task/cgroup in slurm.conf, ConstrainCores=yes in cgroup.conf")
