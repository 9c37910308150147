"""The launch shape: nodes and processes per node, from which the options of SLURM, torchrun and Lightning follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.core.claims import free_gpus, named
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.gpus import ON_CPU, Inventory, inventory

Device = Literal["cuda", "cpu"]

CPU_PROCESSES = 2
"""Default number of ranks on a machine without a GPU: enough to run the distributed code path."""


@dataclass(frozen=True)
class LaunchShape:
    """Number of nodes and of processes on each of them, one process per device."""

    nodes: int
    processes_per_node: int
    device: Device
    """Type of the devices: cuda or cpu."""

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.nodes * self.processes_per_node

    def __str__(self) -> str:
        device = {"cuda": "GPU", "cpu": "CPU process"}[self.device]
        plural = "" if self.world_size == 1 else ("es" if device.endswith("s") else "s")
        return f"{self.world_size} {device}{plural}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")


def resolve(config: dict[str, Any], here: Inventory | None = None) -> LaunchShape:
    """Return the launch shape that `resources.*` requests.

    Args:
        config: The composed configuration.
        here: The GPUs of this machine; None: look for them.

    Raises:
        UserError: The keys contradict each other, or request more than this machine has.
        EnvironmentFault: GPUs are requested on a machine without any, or this machine has some that cannot be used.
    """
    resources = config["resources"]
    _check_limits(resources)
    is_local = config["cluster"]["name"] == "local"
    nodes = _nodes(resources, is_local)
    gpus = _gpus(config, nodes, is_local, here)
    shape = _spread("gpus", gpus, nodes, "cuda") if gpus else _cpu(config, nodes)
    if config["strategy"]["name"] == "single" and shape.world_size > 1:
        raise UserError(
            f"strategy=single is one process, but resources request {shape}",
            "use strategy=ddp, or resources.gpus=1 (on CPU: resources.cpu_processes=1)",
        )
    return shape


def _check_limits(resources: dict[str, Any]) -> None:
    # Not at the top: the schema imports omegaconf, and `trainer ls` reads shapes.
    from trainer.config.limits import limits_of
    from trainer.config.schema import Resources

    for key, limit in limits_of(Resources).items():
        value = resources.get(key)
        problem = limit.problem(f"resources.{key}", value) if value is not None else None
        if problem is not None and key == "gpus":
            fix = "resources.gpus=0 trains on CPU; resources.gpus=null uses all GPUs that nobody uses"
            raise UserError(problem.message, fix)
        if problem is not None:
            raise problem


def _nodes(resources: dict[str, Any], is_local: bool) -> int:
    gpus, per_node = resources.get("gpus"), resources.get("gpus_per_node")
    nodes = resources.get("nodes")
    if nodes is None and not is_local and gpus and per_node:
        nodes = -(-gpus // per_node)
    nodes = nodes or 1
    if is_local and nodes > 1:
        raise UserError(
            f"resources.nodes={nodes} with cluster=local, which is a single machine",
            "use cluster=slurm, or `launch/node RUN_DIR --nodes N --rendezvous HOST:PORT` on each machine",
        )
    minimum = resources.get("min_nodes")
    if minimum is not None and minimum > nodes:
        raise UserError(
            f"resources.min_nodes={minimum} is more than resources.nodes={nodes}",
            f"use resources.min_nodes={nodes} or less",
        )
    return int(nodes)


def _gpus(config: dict[str, Any], nodes: int, is_local: bool, here: Inventory | None) -> int:
    """Return the total number of GPUs; 0: train on CPU."""
    resources = config["resources"]
    gpus, per_node = resources.get("gpus"), resources.get("gpus_per_node")
    if gpus is not None and per_node is not None and gpus != nodes * per_node:
        raise UserError(
            f"resources.gpus={gpus} is not resources.nodes={nodes} times resources.gpus_per_node={per_node}",
            f"use resources.gpus={nodes * per_node}, or remove one of the three",
        )
    requested = gpus if gpus is not None else nodes * per_node if per_node is not None else None
    devices = resources.get("devices")
    if not is_local:
        if devices is not None:
            fix = "remove it: SLURM assigns GPUs; cluster.gpu_type chooses their type"
            raise UserError(f"resources.devices={_listed(devices)} with cluster={config['cluster']['name']}", fix)
        return requested or 0
    if devices == []:
        raise UserError("resources.devices=[] names no GPU", "use resources.gpus=0 to train on CPU")
    if devices is not None and requested not in (None, len(devices)):
        raise UserError(
            f"resources.devices={_listed(devices)} and resources.gpus={requested} contradict each other",
            f"use resources.gpus={len(devices)}, or remove one of them",
        )
    if requested == 0:
        return 0
    found = inventory() if here is None else here
    if found.problem is not None:
        raise found.problem  # never a training on CPU because a driver is broken
    if devices is not None:
        return len(named(found.gpus, devices))
    available = found.most
    if requested is None:
        # If all are in use, the launch reports by whom.
        free = free_gpus(found) or available
        return min(free, 1) if config["strategy"]["name"] == "single" else free
    if available == 0:
        raise EnvironmentFault(
            f"resources.gpus={requested}, but this machine has no usable GPU",
            f"check nvidia-smi and CUDA_VISIBLE_DEVICES; {ON_CPU}",
        )
    if requested > available:
        mig = "; CUDA shows a process one MIG instance only" if len(found.gpus) > available else ""
        message = f"resources.gpus={requested}, but this machine has {available}{mig}"
        raise UserError(message, f"use resources.gpus={available} or less")
    return int(requested)


def _listed(devices: list[str]) -> str:
    return f"[{','.join(map(str, devices))}]"


def _cpu(config: dict[str, Any], nodes: int) -> LaunchShape:
    processes = config["resources"].get("cpu_processes")
    if processes is None:
        processes = nodes if config["strategy"]["name"] == "single" else max(CPU_PROCESSES, nodes)
    return _spread("cpu_processes", processes, nodes, "cpu")


def _spread(key: str, count: int, nodes: int, device: Device) -> LaunchShape:
    if count % nodes:
        nearest = max(nodes, count // nodes * nodes)
        raise UserError(
            f"resources.{key}={count} is not divisible by resources.nodes={nodes}",
            f"use resources.{key}={nearest} or {count // nodes * nodes + nodes}",
        )
    return LaunchShape(nodes, count // nodes, device)
