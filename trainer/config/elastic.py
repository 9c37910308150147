"""With how many nodes a run goes on where some of those it asked for are missing (`resources.min_nodes`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.config.shape import LaunchShape
from trainer.config.strategy import ranks_in_group, ranks_per_sample
from trainer.core.errors import UserError


def most_nodes(config: dict[str, Any], wanted: LaunchShape, available: int) -> int | None:
    """At most `available` and those of `wanted`, at least `resources.min_nodes` (null: all), and such a number that the
    ranks share the global batch and the strategy's groups evenly. None: there is no such number."""
    least = config["resources"].get("min_nodes") or wanted.nodes
    for nodes in range(min(available, wanted.nodes), least - 1, -1):
        if nodes == wanted.nodes or _shares_evenly(config, replace(wanted, nodes=nodes)):
            return nodes
    return None


def least_nodes(config: dict[str, Any], wanted: LaunchShape) -> int:
    """The smallest number that `most_nodes` would choose: with fewer the run could not go on."""
    least = config["resources"].get("min_nodes") or wanted.nodes
    return next(nodes for nodes in range(least, wanted.nodes + 1) if most_nodes(config, wanted, nodes) == nodes)


def _shares_evenly(config: dict[str, Any], shape: LaunchShape) -> bool:
    strategy, batch_size = config["strategy"], config["data"].get("batch_size")
    try:
        ranks_in_group(strategy, shape.world_size, shape.processes_per_node)
    except UserError:
        return False
    readers = shape.world_size // ranks_per_sample(strategy, shape.processes_per_node)
    return batch_size is not None and int(batch_size) % readers == 0
