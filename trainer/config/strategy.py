"""Options of each strategy; `strategy.name` chooses the class. Nothing here imports torch. See docs/strategies.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.limits import NonNegativeInt, PositiveInt
from trainer.core.errors import UserError

ActivationCheckpointing = Literal["none", "full", "selective", "auto"]
"""Kinds of activation checkpointing."""
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""Modes of torch.compile."""
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that use CUDA graphs."""
Offload = Literal["none", "cpu", "nvme"]
"""Places to which DeepSpeed offloads state."""


@dataclass(eq=False, repr=False)
class Single:
    """A single process, without a wrapper around the model. Its options hold for all strategies."""

    name: str = "single"
    """Name of the strategy."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activation checkpointing. none: keep all activations; full: keep the input of a block and recompute the rest;
    selective: also keep matrix products; auto: what the plan says is fastest and fits, else none."""
    compile: bool = False
    """Apply torch.compile to each block, before it is wrapped, and to the loss of our language models."""
    compile_mode: CompileMode = "default"
    """Mode of torch.compile: reduce-overhead and max-autotune use CUDA graphs, which remove the launches of small
    kernels (single and ddp without accumulation); max-autotune and max-autotune-no-cudagraphs try more kernels."""
    compile_fullgraph: bool = False
    """Refuse a block that torch.compile cannot trace as one graph; false: it runs the rest without compiling."""
    compile_dynamic: bool | None = None
    """Compile for any size (true) or for each size of its own (false); null: torch decides, and compiles for any size
    once it sees a second one."""


@dataclass(eq=False, repr=False)
class Ddp(Single):
    """DistributedDataParallel: a full copy of the model on each rank, gradients averaged."""

    name: str = "ddp"
    """Name of the strategy."""
    bucket_cap_mb: PositiveInt = 25
    """Size of the all-reduce buckets in MiB."""
    find_unused_parameters: bool = False
    """For models with parameters that get no gradient in a step; costs a traversal of the autograd graph per step."""
    gradient_as_bucket_view: bool = True
    """Make gradients views of the buckets, which saves one copy."""
    comm_hook: Literal["none", "bf16_compress", "fp16_compress"] = "none"
    """Communication hook of torch's DDP: bf16_compress and fp16_compress halve the traffic by rounding the gradients
    before they are averaged (fp16 overflows above 65504)."""
    broadcast_buffers: Literal["auto", "always", "evaluation"] = "auto"
    """When to broadcast rank 0's buffers. always: before each forward pass, as DDP does; evaluation: before the model
    is evaluated; auto: evaluation if the buffers are running statistics of normalization layers, else always."""


@dataclass(eq=False, repr=False)
class Fsdp(Single):
    """FSDP2: parameters, gradients and optimizer state sharded over all ranks, each block gathered when needed."""

    name: str = "fsdp"
    """Name of the strategy."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block after its forward pass; false: keep them for the backward pass."""
    param_dtype: Literal["auto", "float32"] = "auto"
    """Data type of gathered weights under bf16-mixed. auto: bfloat16; float32: every operation of the network computes
    as with ddp, for twice the traffic."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the gradient reduction; bfloat16 halves the traffic and loses bits that the sum needs."""
    gradient_sync: Literal["micro_batch", "step"] = "micro_batch"
    """With gradient accumulation, when gradients are reduced over the ranks. micro_batch: after each micro-batch, so
    that a rank keeps only its shard of them; step: once a step, which is less traffic, but each rank keeps unsharded
    fp32 gradients of the whole model."""
    prefetch: NonNegativeInt = 1
    """Number of blocks to gather ahead of the block that computes."""
    cpu_offload: bool = False
    """Keep shards and gradients in host memory and run the optimizer step there; no effect on CPU ranks."""
    defer_parameters: bool = True
    """Build the model on the meta device, and create each parameter when it is sharded; with tp, whole."""
    blocks: str | None = None
    """Class name of the modules to shard one by one; null: the model's `blocks()`, or its repeated modules."""


@dataclass(eq=False, repr=False)
class Hsdp(Fsdp):
    """FSDP2 within groups of ranks and copies between the groups, so that slow links carry only gradients."""

    name: str = "hsdp"
    """Name of the strategy."""
    shard_size: PositiveInt | None = None
    """Number of ranks that share one copy of the model; null: the ranks of a node."""


@dataclass(eq=False, repr=False)
class Tp(Fsdp):
    """Tensor parallelism through DTensor, with FSDP2 over the other dimension (2D)."""

    name: str = "tp"
    """Name of the strategy."""
    tensor_parallel_size: PositiveInt | None = None
    """Number of ranks that share each layer and read the same samples; null: the ranks of a node."""
    sequence_parallel: bool = False
    """Split norms, dropout and the residual stream over these ranks as well, by positions of the sequence; the network
    declares where in its `sequence_parallel()`."""
    loss_parallel: bool = False
    """Split the output layer of a language model over these ranks by tokens of the vocabulary, and compute the loss
    from the parts; the layer must not share its weight with the embedding (`model.tied=false`)."""


@dataclass(eq=False, repr=False)
class _Deepspeed(Single):
    reduce_bucket_size: PositiveInt = 200_000_000
    """Elements per gradient bucket."""
    allgather_bucket_size: PositiveInt = 200_000_000
    """Elements per all-gather."""
    overlap_comm: bool = True
    """Overlap the gradient reduction with the backward pass."""
    offload_optimizer: Offload = "none"
    """Location of the optimizer state and the optimizer step, with any optimizer: none (on the GPU), cpu or nvme."""
    nvme_path: str = "/local_nvme"
    """Directory on the node-local NVMe drive, for nvme."""


@dataclass(eq=False, repr=False)
class DeepspeedZero1(_Deepspeed):
    """DeepSpeed ZeRO stage 1: optimizer state sharded."""

    name: str = "deepspeed_zero1"
    """Name of the strategy."""
    stage: int = 1
    """ZeRO stage."""


@dataclass(eq=False, repr=False)
class DeepspeedZero2(_Deepspeed):
    """DeepSpeed ZeRO stage 2: optimizer state and gradients sharded."""

    name: str = "deepspeed_zero2"
    """Name of the strategy."""
    stage: int = 2
    """ZeRO stage."""


@dataclass(eq=False, repr=False)
class DeepspeedZero3(_Deepspeed):
    """DeepSpeed ZeRO stage 3: optimizer state, gradients and parameters sharded."""

    name: str = "deepspeed_zero3"
    """Name of the strategy."""
    stage: int = 3
    """ZeRO stage."""
    offload_parameters: Offload = "none"
    """Location of parameters between uses: none (on the GPU), cpu or nvme."""


@dataclass(eq=False, repr=False)
class Auto(Single):
    """Choice by the plan where its closed form is known, else by hardware: one rank single, GPUs fsdp, CPU ddp."""

    name: str = "auto"
    """Name of the strategy."""


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
"""Options class by strategy name."""


def chosen_by_auto(world_size: int, device_type: str) -> str:
    """Return the name of the strategy that `auto` stands for where no plan has chosen one."""
    return "single" if world_size == 1 else "fsdp" if device_type == "cuda" else "ddp"


def ranks_in_group(strategy: Mapping[str, Any], world_size: int, ranks_of_node: int) -> int:
    """Return how many ranks share each layer (tp) or one copy of the model (hsdp); 1 for other strategies.

    Raises:
        UserError: This number does not divide the number of all ranks.
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
    """Return how many ranks read the same samples: more than one only with tensor parallelism."""
    if strategy["name"] != "tp":
        return 1
    return strategy.get("tensor_parallel_size") or ranks_of_node
