"""Bytes of parameters, gradients and optimizer states, by strategy, precision and optimizer. Imports no torch.

They are those of rank 0, whose shards are the largest, before the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.plan.decoder import Parameter

SIZES = {"64": 8, "32": 4, "bf16": 2, "16": 2}
_STEP = 4
"""Bytes of the step counter that an optimizer keeps for each parameter."""


@dataclass(frozen=True)
class Layout:
    """How parameters are spread over the ranks."""

    strategy: str
    """Name of the strategy, not `auto`."""
    shards: int = 1
    """Ranks over which parameters are sharded."""
    tensor: int = 1
    """Ranks that share each layer by tensor parallelism."""
    world_size: int = 1
    splits_vocabulary: bool = False
    """`strategy.loss_parallel`."""
    precision: str = "32-true"
    """Lightning's name, not `auto`."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of a parameter."""
        kind, _, mode = self.precision.partition("-")
        return SIZES[kind] if mode == "true" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of a matrix product."""
        return SIZES[self.precision.partition("-")[0]]

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards the parameters."""
        return self.strategy in ("fsdp", "hsdp", "tp")

    @property
    def zero_stage(self) -> int:
        """Stage of DeepSpeed ZeRO; 0: another strategy."""
        return int(self.strategy[-1]) if self.strategy.startswith("deepspeed") else 0

    def split(self, parameter: Parameter) -> tuple[int, ...]:
        """Return the shape on a rank of tensor parallelism, before it is sharded."""
        split = parameter.split
        if self.splits_vocabulary and parameter.name == "head.weight":
            split = 0
        return tuple(size // self.tensor if axis == split else size for axis, size in enumerate(parameter.shape))

    def local(self, parameter: Parameter) -> tuple[int, ...]:
        """Return the shape of rank 0's shard: FSDP2 splits the first dimension, and pads the last shards."""
        shape = self.split(parameter)
        return (-(-shape[0] // self.shards), *shape[1:]) if self.is_sharded else shape


@dataclass(frozen=True)
class States:
    """Bytes on rank 0."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum: what is there when the optimizer's step begins."""
        return self.parameters + self.gradients + self.optimizer


def states(parameters: Iterable[Parameter], layout: Layout, optimizer: Mapping[str, Any], frozen: set[str]) -> States:
    """Return the bytes of parameters, gradients and optimizer states.

    Args:
        parameters: All parameters, a tied one once.
        layout: How they are spread.
        optimizer: The section `optimizer`.
        frozen: Names of the parameters that are not trained: they have neither gradients nor states.

    Raises:
        NotImplementedError: The optimizer's states have no formula.
    """
    known = list(parameters)
    trained = [one for one in known if one.name not in frozen]
    if layout.zero_stage:
        return _zero(known, trained, layout, optimizer)
    sizes = [math.prod(layout.local(one)) for one in known]
    trained_elements = sum(math.prod(layout.local(one)) for one in trained)
    of = optimizer_bytes(optimizer, layout)
    return States(
        sum(sizes) * layout.weight_bytes,
        trained_elements * layout.weight_bytes,
        sum(of(one, layout.local(one), layout.weight_bytes) for one in trained),
    )


def optimizer_bytes(
    node: Mapping[str, Any], layout: Layout | None = None
) -> Callable[[Parameter, tuple[int, ...], int], int]:
    """Return the function from a parameter, its local shape and the bytes of its elements to those of its states.

    Raises:
        NotImplementedError: The optimizer's states have no formula.
    """
    name = str(node.get("_target_"))
    short = name.rpartition(".")[2]
    if name == "trainer.optimizers.LowMemoryAdamW":
        return lambda parameter, local, size: _low_memory(node, parameter, local, size)
    if name == "trainer.optimizers.Muon":
        return lambda parameter, local, size: (
            math.prod(local) * size if parameter.is_hidden else _STEP + 2 * size * math.prod(local)
        )
    if not name.startswith("torch.optim."):
        raise NotImplementedError(f"the states of {name} have no formula")
    if short == "SGD":
        moments, step = int(bool(node.get("momentum"))), 0
    elif short in ("Adam", "AdamW", "NAdam", "RAdam"):
        moments, step = 2 + int(bool(node.get("amsgrad"))), _STEP * (2 if short == "NAdam" else 1)
    elif short == "RMSprop":
        moments, step = 1 + int(bool(node.get("momentum"))) + int(bool(node.get("centered"))), _STEP
    elif short == "Adagrad":
        moments, step = 1, _STEP
    else:
        raise NotImplementedError(f"the states of {name} have no formula")
    return lambda parameter, local, size: step + moments * size * math.prod(local)


def _low_memory(node: Mapping[str, Any], parameter: Parameter, local: tuple[int, ...], size: int) -> int:
    """Return the bytes of `trainer.optimizers.LowMemoryAdamW`; whether 8 bits are used depends on the whole shape."""
    states, elements = node.get("states", "8bit"), math.prod(local)
    master = 4 * elements if node.get("master_weights") and size != 4 else 0
    row = math.prod(parameter.shape[1:])
    block = math.gcd(row, 256)
    if states == "8bit" and len(parameter.shape) >= 2 and math.prod(parameter.shape) >= 4096 and block >= 64:
        return _STEP + master + 2 * (elements + 4 * local[0] * (row // block))
    return _STEP + master + 2 * elements * (2 if states == "bfloat16" else 4)


def _zero(known: list[Parameter], trained: list[Parameter], layout: Layout, optimizer: Mapping[str, Any]) -> States:
    """Return the bytes under DeepSpeed: weights in the type of the products, fp32 master weights and states sharded.

    Stages 1 and 2 flatten the trained parameters and pad them to a multiple of twice the ranks (`stage_1_and_2.py`,
    `nccl_start_alignment_factor`). Of gradients they keep those of the rank's part until the update, the last of them
    whole where the part ends within it: a view keeps its storage. Stage 3 pads each parameter to a multiple of the
    ranks (`partition_parameters.py`). In 32-true the fp32 copy is there as well.
    """
    ranks, size = layout.world_size, layout.compute_bytes
    of = optimizer_bytes(optimizer)
    whole = [math.prod(one.shape) for one in known]
    flat = sum(math.prod(one.shape) for one in trained)
    if layout.zero_stage == 3:
        part = sum(-(-math.prod(one.shape) // ranks) for one in trained)
        weights = size * sum(-(-elements // ranks) for elements in whole)
    else:
        padded = -(-flat // (2 * ranks)) * 2 * ranks
        part = padded // ranks
        weights = size * (sum(whole) - flat + padded)
    gradients = size * (part if layout.zero_stage == 3 else _first_whole(trained, part))
    flattened = Parameter("flat", (part,), "root")
    return States(weights, gradients, 4 * part + of(flattened, (part,), 4))


def _first_whole(trained: list[Parameter], part: int) -> int:
    """Return the elements of the first parameters that fill a part, the last of them whole."""
    total = 0
    for one in trained:
        if total >= part:
            break
        total += math.prod(one.shape)
    return max(total, part)
