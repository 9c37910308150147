"""What the cluster is: its partitions, limits and nodes, from `scontrol` and `sinfo`."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field

from trainer.slurm.commands import SlurmRefused, run
from trainer.slurm.options import seconds


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike."""

    cpus: int
    memory_mb: int
    gpus: dict[str, int]
    """Type to count; the type is "" where the cluster names none."""
    count: int

    @property
    def num_gpus(self) -> int:
        return sum(self.gpus.values())

    def gpus_of(self, gpu_type: str | None) -> int:
        """GPUs of this type; of the commonest type where none is asked for: one job gets one type a node."""
        return self.gpus.get(gpu_type, 0) if gpu_type else max(self.gpus.values(), default=0)


@dataclass(frozen=True)
class Partition:
    """A partition and its limits; null: none."""

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
        return sum(kind.count for kind in self.kinds)

    @property
    def gpu_types(self) -> list[str]:
        return sorted({gpu_type for kind in self.kinds for gpu_type in kind.gpus if gpu_type})


_REMEMBERED_FOR_S = 30.0
_remembered: dict[str, tuple[float, dict[str, Partition]]] = {}


def partitions() -> dict[str, Partition]:
    """Name to partition: two calls, for all the jobs of a sweep. Raises EnvironmentFault when SLURM does not answer."""
    cluster = os.environ.get("SLURM_CONF", "")
    asked, found = _remembered.get(cluster, (0.0, {}))
    if not found or time.monotonic() - asked > _REMEMBERED_FOR_S:
        found = _partitions()
        _remembered[cluster] = (time.monotonic(), found)
    return found


def _partitions() -> dict[str, Partition]:
    described = run("scontrol", "--oneliner", "show", "partition")
    kinds = _kinds(run("sinfo", "--noheader", "--Node", "--all", "--format=%R|%N|%c|%m|%G"))
    found = {}
    for line in described.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" not in values:
            continue
        name = values["PartitionName"]
        found[name] = Partition(
            name=name,
            is_default=values.get("Default") == "YES",
            is_up=values.get("State", "UP") == "UP",
            max_time_s=seconds(values.get("MaxTime", "")),
            default_time_s=seconds(values.get("DefaultTime", "")),
            max_nodes=int(values["MaxNodes"]) if values.get("MaxNodes", "").isdigit() else None,
            allowed_accounts=_names(values.get("AllowAccounts")),
            allowed_qos=_names(values.get("AllowQos")),
            kinds=tuple(kinds.get(name, ())),
        )
    return found


def usable_nodes(partition: str) -> set[str]:
    """The nodes of a partition that run jobs. Raises SlurmRefused where there is no such partition."""
    listed = run(
        "sinfo", "--noheader", "--Node", f"--partition={partition}", "--states=idle,alloc,mix,comp", "--format=%N"
    )
    return set(listed.split())


def _names(listed: str | None) -> tuple[str, ...] | None:
    return None if listed in (None, "ALL", "N/A", "(null)") else tuple(str(listed).split(","))


def _kinds(text: str) -> dict[str, list[NodeKind]]:
    """Partition to the kinds of its nodes."""
    counts: dict[str, dict[tuple[int, int, str], int]] = {}
    for line in text.splitlines():
        partition, _, cpus, memory, gres = line.split("|")
        kind = (int(cpus.rstrip("+")), int(memory.rstrip("+")), gres)
        counts.setdefault(partition, {}).setdefault(kind, 0)
        counts[partition][kind] += 1
    return {
        partition: [NodeKind(cpus, memory, gpus_in(gres), count) for (cpus, memory, gres), count in of_kind.items()]
        for partition, of_kind in counts.items()
    }


def gpus_in(gres: str) -> dict[str, int]:
    """Type to count in `gpu:a100:4(S:0-1),gpu:2,nvme:1`."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.split(":")
        if name != "gpu" or not rest or not rest[-1].isdigit():
            continue
        gpu_type = rest[0] if len(rest) > 1 else ""
        found[gpu_type] = found.get(gpu_type, 0) + int(rest[-1])
    return found


def accounts_of(user: str) -> tuple[set[str], set[str]] | None:
    """The accounts and the QOS that `user` may charge; null where the cluster does not say or does not mind."""
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
    """The long options of this machine's sbatch, without dashes."""
    return set(re.findall(r"--([a-z][a-z-]+)", run("sbatch", "--help")))
