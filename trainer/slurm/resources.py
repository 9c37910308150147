"""Choose the launch shape on this cluster, and refuse a job that could never run before it waits in the queue."""

from __future__ import annotations

import getpass
import math
from collections.abc import Iterator
from typing import Any

from trainer.config.elastic import most_nodes
from trainer.config.problems import raise_all
from trainer.config.shape import LaunchShape
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed
from trainer.core.units import three_digits
from trainer.slurm import facts
from trainer.slurm.commands import is_here
from trainer.slurm.facts import NodeKind, Partition
from trainer.slurm.options import check_extra, check_values, seconds


def check(config: dict[str, Any], shape: LaunchShape) -> None:
    """Check `cluster.*` and `resources.*`. Without SLURM on this machine only their values are checked.

    Raises:
        UserError: Lists all problems.
    """
    cluster, resources = config["cluster"], config["resources"]
    problems = [*check_values(cluster), *_of_elastic(config, shape)]
    if all(resources[key] is None for key in ("gpus", "gpus_per_node", "cpu_processes")):
        fix = "set it: resources.gpus=8, or resources.gpus=0 to train on CPU"
        problems.append(UserError("resources.gpus is not set, and a cluster has no default number", fix))
    if not is_here():
        raise_all([*problems, *check_extra(cluster, set())])
        return
    if cluster["extra"]:
        problems += check_extra(cluster, facts.long_options())
    if not problems:
        problems += _of_cluster(config, shape, facts.partitions())
    raise_all(problems)


def _of_elastic(config: dict[str, Any], shape: LaunchShape) -> Iterator[UserError]:
    """Yield the problem of a `resources.min_nodes` that could never take effect."""
    least = config["resources"]["min_nodes"]
    if least is None or least == shape.nodes:
        return
    if config["data"].get("batch_size") is None:
        yield UserError(
            f"resources.min_nodes={least}: the data has no batch_size, so fewer nodes would change the global batch",
            "set data.batch_size to the samples of an optimizer step, or remove resources.min_nodes",
        )
    elif most_nodes(config, shape, shape.nodes - 1) is None:
        batch_size = config["data"]["batch_size"]
        both = math.lcm(shape.world_size, shape.world_size - shape.processes_per_node)
        yield UserError(
            f"resources.min_nodes={least}: no number of nodes from {least} to {shape.nodes - 1} divides "
            f"data.batch_size={batch_size} and the groups of the strategy evenly",
            f"use data.batch_size={-(-batch_size // both) * both} (and a strategy.shard_size or tensor_parallel_size "
            "within a node), or remove resources.min_nodes",
        )


def choose_nodes(config: dict[str, Any]) -> None:
    """Set `resources.nodes` and `gpus_per_node` if only `resources.gpus` is given.

    Chooses the fewest nodes that have that many GPUs and share them evenly.
    """
    resources = config["resources"]
    gpus = resources["gpus"]
    if not gpus or resources["nodes"] is not None or resources["gpus_per_node"] is not None or not is_here():
        return
    usable = [one for one in _requested(config["cluster"], facts.partitions()) if one is not None]
    most = max(
        (kind.gpus_of(config["cluster"]["gpu_type"]) for partition in usable for kind in partition.kinds), default=0
    )
    if most == 0:
        return
    per_node = next(count for count in range(min(most, gpus), 0, -1) if gpus % count == 0)
    resources["nodes"], resources["gpus_per_node"] = gpus // per_node, per_node


def cpus_per_process(config: dict[str, Any], shape: LaunchShape) -> int | None:
    """Return the cores to request per process.

    They are `cluster.cpus_per_process`, else the cores of a node divided by its GPUs. None leaves the number to the
    cluster, if its nodes are unknown.
    """
    requested = config["cluster"]["cpus_per_process"]
    if requested is not None or not is_here():
        return None if requested is None else int(requested)
    if shape.device == "cpu":
        return 1
    gpu_type = config["cluster"]["gpu_type"]
    shares = [
        kind.cpus // kind.num_gpus
        for partition in _requested(config["cluster"], facts.partitions())
        if partition is not None
        for kind in partition.kinds
        if kind.gpus_of(gpu_type) >= shape.processes_per_node
    ]
    return max(1, min(shares)) if shares else None


def time_limit_s(config: dict[str, Any]) -> int | None:
    """Return the time limit of an allocation; None when neither the configuration nor the partition has one."""
    if config["cluster"]["time"]:
        return seconds(config["cluster"]["time"])
    if not is_here():
        return None
    defaults = [
        one.default_time_s or one.max_time_s for one in _requested(config["cluster"], facts.partitions()) if one
    ]
    return max((one for one in defaults if one is not None), default=None)


def cost(config: dict[str, Any], shape: LaunchShape) -> str | None:
    """Return the maximum cost of an allocation: `up to 64 GPU hours in each allocation of 0-04:00:00`.

    None without a time limit.
    """
    limit_s = time_limit_s(config)
    if limit_s is None:
        return None
    units = (shape.nodes + config["resources"]["spare_nodes"]) * shape.processes_per_node
    what = "GPU" if shape.device == "cuda" else "process"
    return f"up to {three_digits(units * limit_s / 3600)} {what} hours in each allocation of {as_time(limit_s)}"


def _requested(cluster: dict[str, Any], known: dict[str, Partition]) -> list[Partition | None]:
    """Return the partitions that the job may run in; None for an unknown name."""
    if cluster["partition"] is None:
        return [partition for partition in known.values() if partition.is_default]
    return [known.get(name) for name in cluster["partition"].split(",")]


def _of_cluster(config: dict[str, Any], shape: LaunchShape, known: dict[str, Partition]) -> Iterator[UserError]:
    cluster = config["cluster"]
    requested = _requested(cluster, known)
    if not requested:
        fix = f"set cluster.partition to one of: {listed(known)}"
        yield UserError("cluster.partition is not set, and this cluster has no default partition", fix)
    for name, partition in zip((cluster["partition"] or "").split(","), requested, strict=False):
        if partition is None:
            near = did_you_mean(name, known, prefix="cluster.partition=")
            yield UserError(
                f"cluster.partition={name}: this cluster has no such partition", f"{near}it has {listed(known)}"
            )
        else:
            yield from _of_partition(config, shape, partition)
    if cluster["account"] is not None or cluster["qos"] is not None:
        yield from _of_user(cluster)


def _of_user(cluster: dict[str, Any]) -> Iterator[UserError]:
    allowed = facts.accounts_of(getpass.getuser())
    if allowed is None:
        return
    for key, names in zip(("account", "qos"), allowed, strict=True):
        if cluster[key] is not None and cluster[key] not in names:
            yield UserError(f"cluster.{key}={cluster[key]}: you may not use it", f"yours: {listed(names)}")


def _of_partition(config: dict[str, Any], shape: LaunchShape, partition: Partition) -> Iterator[UserError]:
    cluster, name = config["cluster"], partition.name
    if not partition.is_up:
        yield UserError(f"the partition {name} takes no jobs now", "choose another, or wait; see sinfo")
    yield from _of_time(cluster, partition)
    for key, allowed in (("account", partition.allowed_accounts), ("qos", partition.allowed_qos)):
        if cluster[key] is not None and allowed is not None and cluster[key] not in allowed:
            fix = f"it allows {listed(allowed)}"
            yield UserError(f"cluster.{key}={cluster[key]}: the partition {name} does not allow it", fix)
    fitting = [kind for kind in partition.kinds if _fits(kind, cluster, shape)]
    if not fitting:
        yield _too_large_a_node(cluster, shape, partition)
        return
    nodes = shape.nodes + config["resources"]["spare_nodes"]
    most = min(sum(kind.count for kind in fitting), partition.max_nodes or nodes)
    if nodes > most:
        with_spare = f" and resources.spare_nodes={nodes - shape.nodes}" if nodes > shape.nodes else ""
        yield UserError(
            f"resources.nodes={shape.nodes}{with_spare}: the partition {name} has {most} that fit",
            f"use resources.nodes={most} or fewer, or another partition; see sinfo",
        )


def _of_time(cluster: dict[str, Any], partition: Partition) -> Iterator[UserError]:
    asked_s = seconds(cluster["time"]) if cluster["time"] is not None else None
    limit_s = partition.max_time_s
    if asked_s is not None and limit_s is not None and asked_s > limit_s:
        yield UserError(
            f"cluster.time={cluster['time']} is more than the partition {partition.name} allows",
            f"use cluster.time={as_time(limit_s)} or less: a job that takes longer is requeued",
        )
    given_s = asked_s or partition.default_time_s or limit_s
    if given_s is not None and given_s < cluster["save_before_end_s"] + 60:
        yield UserError(
            f"the partition {partition.name} gives {as_time(given_s)}, which leaves no time to train: the checkpoint "
            f"is saved {cluster['save_before_end_s']} s before the time limit",
            "set cluster.time, or a smaller cluster.save_before_end_s",
        )


def _fits(kind: NodeKind, cluster: dict[str, Any], shape: LaunchShape) -> bool:
    processes = shape.processes_per_node
    if shape.device == "cuda" and kind.gpus_of(cluster["gpu_type"]) < processes:
        return False
    if (cluster["cpus_per_process"] or 1) * processes > kind.cpus:
        return False
    memory = cluster["memory_per_process"]
    return memory is None or _megabytes(memory) * processes <= kind.memory_mb


def _too_large_a_node(cluster: dict[str, Any], shape: LaunchShape, partition: Partition) -> UserError:
    """Return the problem of a job whose share of a node is larger than any node: the number, and what nodes have."""
    processes, name = shape.processes_per_node, partition.name
    gpu_type = cluster["gpu_type"]
    if shape.device == "cuda":
        if gpu_type and gpu_type not in partition.gpu_types:
            near = did_you_mean(gpu_type, partition.gpu_types, prefix="cluster.gpu_type=")
            fix = f"{near}it has {listed(partition.gpu_types)}"
            return UserError(f"cluster.gpu_type={gpu_type}: the partition {name} has no such GPU", fix)
        most = max((kind.gpus_of(gpu_type) for kind in partition.kinds), default=0)
        if processes > most:
            return UserError(
                f"resources.gpus_per_node={processes}: a node of the partition {name} has {most} at most",
                f"use resources.gpus_per_node={most} or fewer, over more nodes" if most else "choose one with GPUs",
            )
    cpus = max((kind.cpus for kind in partition.kinds), default=0)
    if (cluster["cpus_per_process"] or 1) * processes > cpus:
        return UserError(
            f"{processes} processes a node with cluster.cpus_per_process={cluster['cpus_per_process'] or 1}: "
            f"a node of the partition {name} has {cpus} cores at most",
            f"use cluster.cpus_per_process={cpus // processes} or fewer" if cpus >= processes else "use more nodes",
        )
    memory_mb = max((kind.memory_mb for kind in partition.kinds), default=0)
    return UserError(
        f"{processes} processes a node with cluster.memory_per_process={cluster['memory_per_process']}: "
        f"a node of the partition {name} has {memory_mb} MB at most",
        f"use cluster.memory_per_process={memory_mb // processes}M or less",
    )


def _megabytes(memory: str) -> int:
    """Return SLURM memory such as `60G` in MB, rounded up. SLURM's units are powers of 1024."""
    kilobytes = {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}[memory[-1]]
    return -(-int(memory[:-1]) * kilobytes // 1024)


def as_time(time_s: int) -> str:
    """Format seconds as D-HH:MM:SS."""
    minutes, second = divmod(time_s, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minute:02d}:{second:02d}"
