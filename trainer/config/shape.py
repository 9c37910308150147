"""The launch shape: how many processes run where. What SLURM, torchrun and Lightning are told is derived here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.hardware import count_gpus

CPU_PROCESSES = 2
"""Ranks on a machine without a GPU, when the config does not say: enough to run the distributed path for real."""


@dataclass(frozen=True)
class LaunchShape:
    """One process a device on every node."""

    nodes: int
    processes_per_node: int
    device: str
    """cuda or cpu"""

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    def to_dict(self) -> dict[str, Any]:
        """As in `launch.json`."""
        return asdict(self)

    @staticmethod
    def from_dict(shape: dict[str, Any]) -> LaunchShape:
        return LaunchShape(int(shape["nodes"]), int(shape["processes_per_node"]), str(shape["device"]))

    def __str__(self) -> str:
        device = {"cuda": "GPU", "cpu": "CPU process"}[self.device]
        plural = "" if self.world_size == 1 else ("es" if device.endswith("s") else "s")
        return f"{self.world_size} {device}{plural}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")


def resolve(config: dict[str, Any], gpus_here: int | None = None) -> LaunchShape:
    """The shape that `resources.*` asks for.

    `gpus_here` is the number of GPUs of this machine; null: count them. Raises UserError for a shape that
    contradicts itself or this machine, EnvironmentFault when GPUs are asked for on a machine without any.
    """
    resources = config["resources"]
    _check_signs(resources)
    is_local = config["cluster"]["name"] == "local"
    nodes = _nodes(resources, is_local)
    gpus = _gpus(config, nodes, is_local, gpus_here)
    shape = _spread("gpus", gpus, nodes, "cuda") if gpus else _cpu(config, nodes)
    if config["strategy"]["name"] == "single" and shape.world_size > 1:
        raise UserError(
            f"strategy=single is one process, and resources ask for {shape}",
            "use strategy=ddp, or resources.gpus=1 (on CPU: resources.cpu_processes=1)",
        )
    return shape


def _check_signs(resources: dict[str, Any]) -> None:
    smallest = {
        "nodes": 1,
        "gpus": 0,
        "gpus_per_node": 0,
        "cpu_processes": 1,
        "min_nodes": 1,
        "spare_nodes": 0,
    }
    for key, minimum in smallest.items():
        value = resources.get(key)
        if value is not None and value < minimum:
            hint = (
                "resources.gpus=0 trains on CPU; left out it means all GPUs of this machine"
                if key == "gpus"
                else (f"use resources.{key}={minimum} or more")
            )
            raise UserError(f"resources.{key}={value} must be at least {minimum}", hint)


def _nodes(resources: dict[str, Any], is_local: bool) -> int:
    gpus, per_node = resources.get("gpus"), resources.get("gpus_per_node")
    nodes = resources.get("nodes")
    if nodes is None and not is_local and gpus and per_node:
        nodes = -(-gpus // per_node)
    nodes = nodes or 1
    if is_local and nodes > 1:
        raise UserError(
            f"resources.nodes={nodes} with cluster=local: this is one machine",
            "use cluster=slurm, or `launch/node RUN_DIR --nodes N --rendezvous HOST:PORT` on each machine",
        )
    minimum = resources.get("min_nodes")
    if minimum is not None and minimum > nodes:
        raise UserError(
            f"resources.min_nodes={minimum} is more than the {nodes} of resources.nodes",
            f"use resources.min_nodes={nodes} or less",
        )
    return int(nodes)


def _gpus(config: dict[str, Any], nodes: int, is_local: bool, gpus_here: int | None) -> int:
    """GPUs in all; 0: train on CPU."""
    resources = config["resources"]
    gpus, per_node = resources.get("gpus"), resources.get("gpus_per_node")
    if gpus is not None and per_node is not None and gpus != nodes * per_node:
        raise UserError(
            f"resources.gpus={gpus} is not resources.nodes={nodes} times resources.gpus_per_node={per_node}",
            f"use resources.gpus={nodes * per_node}, or leave one of the three out",
        )
    asked = gpus if gpus is not None else nodes * per_node if per_node is not None else None
    if not is_local:
        return asked or 0
    if asked == 0:
        return 0
    here = count_gpus() if gpus_here is None else gpus_here
    if asked is None:
        return min(here, 1) if config["strategy"]["name"] == "single" else here
    if here == 0:
        raise EnvironmentFault(
            f"resources.gpus={asked}, and this machine has no GPU that can be used",
            "use resources.gpus=0 to train on CPU, or look at nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    if asked > here:
        raise UserError(f"resources.gpus={asked}, and this machine has {here}", f"use resources.gpus={here} or less")
    return int(asked)


def _cpu(config: dict[str, Any], nodes: int) -> LaunchShape:
    processes = config["resources"].get("cpu_processes")
    if processes is None:
        processes = nodes if config["strategy"]["name"] == "single" else max(CPU_PROCESSES, nodes)
    return _spread("cpu_processes", processes, nodes, "cpu")


def _spread(key: str, count: int, nodes: int, device: str) -> LaunchShape:
    if count % nodes:
        nearest = max(nodes, count // nodes * nodes)
        raise UserError(
            f"resources.{key}={count} cannot be shared out evenly over resources.nodes={nodes}",
            f"use resources.{key}={nearest} or {count // nodes * nodes + nodes}",
        )
    return LaunchShape(nodes, count // nodes, device)
