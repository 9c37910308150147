"""Read the partitions, limits and nodes of the cluster from `scontrol` and `sinfo`."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field

from trainer.slurm.commands import SlurmRefused, number, run
from trainer.slurm.options import seconds


@dataclass(frozen=True)
class NodeKind:
    """A group of identical nodes of a partition."""

    cpus: int
    memory_mb: int
    gpus: dict[str, int]
    """GPU type to count per node; the type is "" when the cluster does not name it."""
    count: int
    """Number of nodes."""

    @property
    def num_gpus(self) -> int:
        """GPUs of a node, of all types."""
        return sum(self.gpus.values())

    def gpus_of(self, gpu_type: str | None) -> int:
        """Return the GPUs of this type per node, or of the most frequent type: a job gets one type per node."""
        return self.gpus.get(gpu_type, 0) if gpu_type else max(self.gpus.values(), default=0)


@dataclass(frozen=True)
class Partition:
    """A partition and its limits; a limit is None if it is not set."""

    name: str
    is_default: bool
    is_up: bool
    max_time_s: int | None
    default_time_s: int | None
    max_nodes: int | None
    allowed_accounts: tuple[str, ...] | None
    allowed_qos: tuple[str, ...] | None
    kinds: tuple[NodeKind, ...] = field(default=())

    @property
    def num_nodes(self) -> int:
        """Number of nodes of all kinds."""
        return sum(kind.count for kind in self.kinds)

    @property
    def gpu_types(self) -> list[str]:
        """Names of the GPU types, sorted."""
        return sorted({gpu_type for kind in self.kinds for gpu_type in kind.gpus if gpu_type})


_CACHED_FOR_S = 30.0
_cache: dict[str, tuple[float, dict[str, Partition]]] = {}
"""SLURM_CONF to the time of the query and its result."""


def partitions() -> dict[str, Partition]:
    """Return the partitions by name. Two calls of SLURM serve all jobs of a sweep.

    Raises:
        EnvironmentFault: SLURM does not respond.
    """
    cluster = os.environ.get("SLURM_CONF", "")
    queried, result = _cache.get(cluster, (0.0, {}))
    if not result or time.monotonic() - queried > _CACHED_FOR_S:
        result = _partitions()
        _cache[cluster] = (time.monotonic(), result)
    return result


def _partitions() -> dict[str, Partition]:
    described = run("scontrol", "--oneliner", "show", "partition")
    kinds = _kinds(run("sinfo", "--noheader", "--Node", "--all", "--format=%R|%N|%c|%m|%G"))
    result = {}
    for line in described.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" not in values:
            continue
        name = values["PartitionName"]
        result[name] = Partition(
            name=name,
            is_default=values.get("Default") == "YES",
            is_up=values.get("State", "UP") == "UP",
            max_time_s=seconds(values.get("MaxTime", "")),
            default_time_s=seconds(values.get("DefaultTime", "")),
            max_nodes=number(values.get("MaxNodes", "")),
            allowed_accounts=_names(values.get("AllowAccounts")),
            allowed_qos=_names(values.get("AllowQos")),
            kinds=tuple(kinds.get(name, ())),
        )
    return result


def usable_nodes(partition: str) -> set[str]:
    """Return the nodes of a partition that can run jobs.

    Raises:
        SlurmRefused: There is no such partition.
    """
    listed = run(
        "sinfo", "--noheader", "--Node", f"--partition={partition}", "--states=idle,alloc,mix,comp", "--format=%N"
    )
    return set(listed.split())


def _names(listed: str | None) -> tuple[str, ...] | None:
    return None if listed in (None, "ALL", "N/A", "(null)") else tuple(str(listed).split(","))


def _kinds(text: str) -> dict[str, list[NodeKind]]:
    """Return the kinds of nodes of each partition, from the output of sinfo; other lines are left out."""
    counts: dict[str, dict[tuple[int, int, str], int]] = {}
    for line in text.splitlines():
        partition, *_, cpus, memory, gres = line.split("|") if line.count("|") == 4 else [""] * 4
        num_cpus, memory_mb = number(cpus.rstrip("+")), number(memory.rstrip("+"))
        if num_cpus is None or memory_mb is None:
            continue
        kind = (num_cpus, memory_mb, gres)
        counts.setdefault(partition, {}).setdefault(kind, 0)
        counts[partition][kind] += 1
    return {
        partition: [NodeKind(cpus, memory, gpus_in(gres), count) for (cpus, memory, gres), count in of_kind.items()]
        for partition, of_kind in counts.items()
    }


def gpus_in(gres: str) -> dict[str, int]:
    """Return GPU type to count of a GRES string such as `gpu:a100:4(S:0-1),gpu:2,nvme:1`."""
    gpus: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.split(":")
        if name != "gpu" or not rest or (count := number(rest[-1])) is None:
            continue
        gpu_type = rest[0] if len(rest) > 1 else ""
        gpus[gpu_type] = gpus.get(gpu_type, 0) + count
    return gpus


def accounts_of(user: str) -> tuple[set[str], set[str]] | None:
    """Return the accounts and QOS that `user` may use; None when the cluster does not enforce or does not show them."""
    try:
        enforced = re.search(r"^AccountingStorageEnforce\s*=(.*)$", run("scontrol", "show", "config"), re.MULTILINE)
        if not enforced or "associations" not in enforced[1]:
            return None
        listed = run("sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,qos")
    except SlurmRefused:
        return None
    accounts: set[str] = set()
    qos: set[str] = set()
    for line in listed.splitlines():
        account, _, names = line.partition("|")
        accounts.add(account)
        qos.update(name for name in names.split(",") if name)
    return accounts, qos


def long_options() -> set[str]:
    """Return the long options of the installed sbatch, without dashes."""
    return set(re.findall(r"--([a-z][a-z-]+)", run("sbatch", "--help")))
