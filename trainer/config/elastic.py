"""Elastic number of nodes: how many nodes a run uses if some are unavailable (`resources.min_nodes`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.config.shape import LaunchShape
from trainer.config.strategy import ranks_in_group, ranks_per_sample
from trainer.core.errors import UserError


def most_nodes(config: dict[str, Any], requested: LaunchShape, available: int) -> int | None:
    """Return the largest number of nodes that can be used, or None.

    It is at most `available` and the nodes of `requested`, and at least `resources.min_nodes` (null: all). The global
    batch and the groups of the strategy must divide evenly over the ranks.
    """
    minimum = config["resources"].get("min_nodes") or requested.nodes
    for nodes in range(min(available, requested.nodes), minimum - 1, -1):
        if nodes == requested.nodes or _divides_evenly(config, replace(requested, nodes=nodes)):
            return nodes
    return None


def least_nodes(config: dict[str, Any], requested: LaunchShape) -> int:
    """Return the smallest number of nodes with which the run can continue."""
    minimum = config["resources"].get("min_nodes") or requested.nodes
    candidates = range(minimum, requested.nodes + 1)
    return next(nodes for nodes in candidates if most_nodes(config, requested, nodes) == nodes)


def _divides_evenly(config: dict[str, Any], shape: LaunchShape) -> bool:
    strategy, batch_size = config["strategy"], config["data"].get("batch_size")
    try:
        ranks_in_group(strategy, shape.world_size, shape.processes_per_node)
    except UserError:
        return False
    readers = shape.world_size // ranks_per_sample(strategy, shape.processes_per_node)
    return batch_size is not None and int(batch_size) % readers == 0
