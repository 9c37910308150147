"""Counts FLOPs, bytes and operators while a step runs on fake tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.plan.work import Counts

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}
"""Fused attention of CPUs, which torch's registry of FLOPs does not have, and its matrix products: the backward pass
computes the scores again (Dao et al. 2022, section 3.1)."""
_FREE = (
    *(_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided),
    *(_aten.new_full, _aten.new_zeros, _aten.new_ones, _aten.scatter_add_),  # of few elements, or a fill
    *(_aten._unsafe_view, _aten.detach, _aten.lift_fresh),
)
_BY_RESULT = {
    **dict.fromkeys((_aten.embedding, _aten.gather, _aten.index_select, _aten.nll_loss_forward), 2),
    **dict.fromkeys((_aten.nll_loss_backward, _aten.embedding_dense_backward, _aten.slice_backward), 1),
}
"""Operators that read only some of an argument, or none of it, and their bytes as a multiple of those of the result."""
_COUNTED = ("aten", "fsdp")
"""Namespaces of the operators that are counted: collectives have formulas of their own (`collectives.py`)."""
_REGISTERED = dict(flop_registry)


class Counter:
    """Adds up the operators of the pass that is named by `during`; None: counts nothing."""

    def __init__(self) -> None:
        self.during: str | None = None
        self.passes: dict[str, Counts] = {}

    def add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operator that has been called."""
        if self.during is None or func.is_view or func.overloadpacket in _FREE or func.namespace not in _COUNTED:
            return
        size = _bytes_of(func, args, kwargs or {}, result)
        if not size:
            return
        flops = _flops(func, args, kwargs or {}, result)
        is_matrix = flops is not None
        one = Counts(flops or 0.0, size if is_matrix else 0.0, 0.0 if is_matrix else size, 1)
        self.passes[self.during] = self.passes.get(self.during, Counts()) + one

    def of(self, name: str) -> Counts:
        """Return the counts of a pass."""
        return self.passes.get(name, Counts())


def _bytes_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes of the tensors that an operator reads and writes."""
    schema, total = func._schema, 0
    if func.overloadpacket in _BY_RESULT:
        return _BY_RESULT[func.overloadpacket] * sum(map(_nbytes, _tensors(result)))
    if func.name() == "fsdp::all_gather_copy_in":
        return 2 * sum(map(_nbytes, _tensors(args[0])))
    overwrites = func.namespace == "fsdp" or func.overloadpacket is _aten.copy_
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        total += sum(map(_nbytes, _tensors(value))) * (2 if is_written and not overwrites else 1)
    returns = schema.returns
    values = result if isinstance(result, tuple) and len(returns) > 1 else (result,)
    for place, value in enumerate(values):
        if place < len(returns) and returns[place].alias_info is not None:
            continue
        total += sum(map(_nbytes, _tensors(value)))
    return total


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> float | None:
    packet = func.overloadpacket
    if packet in _ATTENTION:
        query, key = (_local(one) for one in (args[1:3] if _ATTENTION[packet] == 5 else args[:2]))
        is_causal = kwargs.get("is_causal", any(one is True for one in args))
        pairs = query.shape[-2] * key.shape[-2] * (0.5 if is_causal else 1.0)
        return 2.0 * _ATTENTION[packet] * math.prod(query.shape[:-2]) * pairs * query.shape[-1]
    count = _REGISTERED.get(packet)
    if count is None:
        return None
    local = torch.utils._pytree.tree_map_only(Tensor, _local, (args, kwargs, result))
    return float(count(*local[0], **local[1], out_val=local[2]))


def _tensors(value: Any) -> Iterator[Tensor]:
    for one in tree_leaves(value):
        if isinstance(one, Tensor):
            yield _local(one)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor."""
    inner: Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor if inner is None else inner


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
