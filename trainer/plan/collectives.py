"""What the ranks of a job send to each other in a step, by strategy, and how long it takes. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.plan.states import Layout
from trainer.plan.work import Work

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
Overlap = Literal["forward", "backward", "none"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind within a group of ranks."""

    kind: Kind
    bytes: float
    """Size of the whole buffers, added over the collectives."""
    count: int
    """Number of collectives."""
    ranks: int
    """Ranks of the group."""
    nodes: int
    """Nodes over which the group is spread."""
    overlap: Overlap
    """The pass that hides it."""
    per_step: bool = False
    """Once a step; else with each micro-batch."""


@dataclass(frozen=True)
class Links:
    """Speed of the connections, as collectives reach it."""

    node_bytes_s: float
    """What a rank receives from the ranks of its node."""
    network_bytes_s: float
    """What a rank receives from other nodes while all ranks of its node do the same."""
    latency_s: float
    """Start of a collective."""
    hop_s: float
    """For each further rank of a ring."""


def seconds(one: Traffic, links: Links) -> float:
    """Return the seconds of a collective by a ring (Thakur et al. 2005, section 4).

    Each rank receives all parts but its own, twice for an all-reduce. Between nodes, each node receives what it does
    not hold through the adapters of all its ranks at once.
    """
    if one.ranks == 1 or not one.bytes:
        return 0.0
    rounds = 2 if one.kind == "all-reduce" else 1
    within = one.bytes * (one.ranks - 1) / one.ranks / links.node_bytes_s
    between = 0.0
    if one.nodes > 1:
        of_node = max(1, one.ranks // one.nodes)
        between = one.bytes * (one.nodes - 1) / one.nodes / (of_node * links.network_bytes_s)
        within = within if of_node > 1 else 0.0
    return rounds * (max(within, between) + one.count * (links.latency_s + links.hop_s * (one.ranks - 1)))


def traffic(strategy: Mapping[str, Any], layout: Layout, ranks_of_node: int, work: Work) -> list[Traffic]:
    """Return the collectives of a step.

    Args:
        strategy: The section `strategy`, with `name` not `auto`.
        layout: How the parameters are spread.
        ranks_of_node: Ranks of a node.
        work: Work of a rank, which has the number of parameters.
    """
    name, world, units = layout.strategy, layout.world_size, work.units
    if world == 1:
        return []
    everywhere = (world, -(-world // ranks_of_node))
    compute = layout.compute_bytes if strategy.get("param_dtype", "auto") == "auto" else layout.weight_bytes
    if name == "ddp":
        size = 2 if strategy.get("comm_hook", "none") != "none" else layout.weight_bytes
        buckets = max(1, math.ceil(work.trained * size / ((strategy.get("bucket_cap_mb") or 25) * 2**20)))
        return [Traffic("all-reduce", work.trained * size, buckets, *everywhere, "backward", per_step=True)]
    if layout.zero_stage:
        return _zero(strategy, layout, work, everywhere)
    reduce_bytes = 2 if strategy.get("reduce_dtype") == "bfloat16" else 4
    shards = layout.shards
    group = (shards, max(1, -(-shards * layout.tensor // ranks_of_node)))
    gathered, reduced = work.elements / layout.tensor * compute, work.trained / layout.tensor * reduce_bytes
    sent = [Traffic("all-gather", gathered, units, *group, "forward")]
    if strategy.get("reshard_after_forward", True):
        sent.append(Traffic("all-gather", gathered, units, *group, "backward"))
    once = strategy.get("gradient_sync") == "step"
    sent.append(Traffic("reduce-scatter", reduced, units, *group, "backward", per_step=once))
    if name == "hsdp" and world > shards:
        copies = world // shards
        nodes = max(1, -(-world // ranks_of_node) // group[1])
        sent.append(Traffic("all-reduce", reduced / shards, units, copies, nodes, "backward", per_step=once))
    return sent


def of_tensor_parallelism(tensor: int, ranks_of_node: int, layers: int, bytes_of_features: float) -> list[Traffic]:
    """Return the all-reduces of activations: two in each pass of a block (Shoeybi et al. 2019, section 3)."""
    if tensor == 1:
        return []
    nodes = max(1, -(-tensor // ranks_of_node))
    size = 4 * layers * bytes_of_features
    return [Traffic("all-reduce", size, 4 * layers, tensor, nodes, "none")]


def _zero(strategy: Mapping[str, Any], layout: Layout, work: Work, group: tuple[int, int]) -> list[Traffic]:
    """Return what DeepSpeed ZeRO sends (Rajbhandari et al. 2020, section 7)."""
    size, units = layout.compute_bytes, work.units
    weights, gradients = work.elements * size, work.trained * size
    buckets = max(1, math.ceil(work.trained / (strategy.get("reduce_bucket_size") or 200_000_000)))
    hidden: Overlap = "backward" if strategy.get("overlap_comm", True) else "none"
    if layout.zero_stage == 3:
        return [
            Traffic("all-gather", weights, units, *group, "forward"),
            Traffic("all-gather", weights, units, *group, "backward"),
            Traffic("reduce-scatter", gradients, buckets, *group, hidden),
        ]
    reduction: Kind = "all-reduce" if layout.zero_stage == 1 else "reduce-scatter"
    return [
        Traffic(reduction, gradients, buckets, *group, hidden, per_step=layout.zero_stage == 1),
        Traffic("all-gather", weights, buckets, *group, "none", per_step=True),
    ]
