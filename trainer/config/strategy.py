"""Options of each strategy; `strategy.name` chooses the class. Nothing here imports torch. See docs/strategies.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core.errors import UserError

ACTIVATION_CHECKPOINTING = ("none", "full", "selective")
BROADCAST_BUFFERS = ("auto", "always", "evaluation")
OFFLOAD = ("none", "cpu", "nvme")
REDUCE_DTYPES = ("float32", "bfloat16")


@dataclass(eq=False, repr=False)
class Single:
    """One process, no wrapping."""

    name: str = "single"
    activation_checkpointing: str = "none"
    """none; full: keep a block's input and compute the rest again; selective: keep matrix products, too."""
    compile: bool = False
    """torch.compile of each block, before it is wrapped."""


@dataclass(eq=False, repr=False)
class Ddp(Single):
    """A whole copy of the model on each rank; gradients averaged."""

    name: str = "ddp"
    bucket_cap_mb: int = 25
    """Size of the all-reduce buckets."""
    find_unused_parameters: bool = False
    """For models in which a step leaves parameters without a gradient; costs a walk of the graph a step."""
    gradient_as_bucket_view: bool = True
    """Gradients are views of the buckets: one copy less."""
    broadcast_buffers: str = "auto"
    """When rank 0's buffers go to the others. always: before each forward pass, as DDP does; evaluation: before the
    model is evaluated; auto: evaluation where they are running statistics of normalization layers, else always."""


@dataclass(eq=False, repr=False)
class Fsdp(Single):
    """FSDP2: parameters, gradients and optimizer state in shards, over all ranks; each block gathered when needed."""

    name: str = "fsdp"
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward; false: keep them for backward."""
    reduce_dtype: str = "float32"
    """Gradients are summed in this; bfloat16 halves the traffic and loses bits that the sum needs."""
    prefetch: int = 1
    """Blocks gathered ahead of the one that computes."""
    cpu_offload: bool = False
    """Shards, gradients and optimizer step in host memory; changes nothing on CPU ranks."""
    defer_parameters: bool = True
    """Build the model on the meta device, make its parameters one by one when they are sharded; with tp: whole."""
    blocks: str | None = None
    """Class name of the modules that are sharded one by one; null: the model's `blocks()`, or repeated ones."""


@dataclass(eq=False, repr=False)
class Hsdp(Fsdp):
    """FSDP2 inside groups of ranks, copies between them: the slow links carry gradients only."""

    name: str = "hsdp"
    shard_size: int | None = None
    """Ranks that share one copy; null: those of a node."""


@dataclass(eq=False, repr=False)
class Tp(Fsdp):
    """Tensor parallel through DTensor, and FSDP2 over what is left (2D)."""

    name: str = "tp"
    tensor_parallel_size: int | None = None
    """Ranks that share each layer; null: those of a node. They read the same samples."""


@dataclass(eq=False, repr=False)
class _Deepspeed(Single):
    reduce_bucket_size: int = 200_000_000
    """Elements of a gradient bucket."""
    allgather_bucket_size: int = 200_000_000
    """Elements gathered at once."""
    overlap_comm: bool = True
    """Reduce gradients while backward goes on."""
    offload_optimizer: str = "none"
    """none, cpu, nvme: where optimizer state lives and the optimizer, torch's own or another, works."""
    nvme_path: str = "/local_nvme"
    """A folder on the node's own NVMe, for nvme."""


@dataclass(eq=False, repr=False)
class DeepspeedZero1(_Deepspeed):
    """Optimizer state in shards."""

    name: str = "deepspeed_zero1"
    stage: int = 1


@dataclass(eq=False, repr=False)
class DeepspeedZero2(_Deepspeed):
    """Optimizer state and gradients in shards."""

    name: str = "deepspeed_zero2"
    stage: int = 2


@dataclass(eq=False, repr=False)
class DeepspeedZero3(_Deepspeed):
    """Optimizer state, gradients and parameters in shards."""

    name: str = "deepspeed_zero3"
    stage: int = 3
    offload_parameters: str = "none"
    """none, cpu, nvme: where parameters live between their uses."""


@dataclass(eq=False, repr=False)
class Auto(Single):
    """single on one rank; else fsdp on GPUs, ddp on CPU."""

    name: str = "auto"


STRATEGIES: dict[str, type] = {
    "single": Single,
    "ddp": Ddp,
    "fsdp": Fsdp,
    "hsdp": Hsdp,
    "tp": Tp,
    "deepspeed_zero1": DeepspeedZero1,
    "deepspeed_zero2": DeepspeedZero2,
    "deepspeed_zero3": DeepspeedZero3,
    "auto": Auto,
}
"""Name to options class."""


def ranks_in_group(strategy: Mapping[str, Any], world_size: int, ranks_of_node: int) -> int:
    """Ranks that share each layer (tp) or one copy of the model (hsdp); elsewhere 1.

    Raises UserError where they do not divide all ranks.
    """
    option = {"tp": "tensor_parallel_size", "hsdp": "shard_size"}.get(strategy["name"])
    if option is None:
        return 1
    size: int = strategy.get(option) or ranks_of_node
    if size < 1 or world_size % size:
        divisors = [str(number) for number in range(1, world_size + 1) if world_size % number == 0]
        raise UserError(
            f"strategy.{option}={size} does not divide the {world_size} ranks of this job",
            f"choose one of: {', '.join(divisors)}",
        )
    return size


def ranks_per_sample(strategy: Mapping[str, Any], ranks_of_node: int) -> int:
    """Ranks that read the same samples: more than one only with tensor parallel."""
    if strategy["name"] != "tp":
        return 1
    return strategy.get("tensor_parallel_size") or ranks_of_node
