"""Counts the bytes that tensors hold while a step runs, and what they hold at the peak.

On fake tensors, which have shapes and no values, this needs no GPU and no memory. What differs on a GPU is in
`on_cuda.py`. Not counted: CUDA's context, workspaces of cuBLAS, NCCL's buffers, and memory that torch's allocator
reserves but cannot use (`allowance.py`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from trainer.plan import gloo
from trainer.plan.counted import Counter
from trainer.plan.parts import BUCKETS, COPIES, LOGITS, PARAMETERS, REST

BLOCK = 512
"""Bytes to which torch's allocator on CUDA rounds an allocation."""
_COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of the collectives; DTensor calls the second."""
_GROUPS = ("process_group", "group_name")
"""Names of the argument that is the group, in these namespaces."""
_CALLERS = 16
"""Python frames between an operator and the function of FSDP2 that called it: at most about ten."""


class Tracked(TorchDispatchMode):
    """Sums the sizes of all storages that operators have made and that are still alive.

    A storage is known from the first operator that returns it, and gone when torch frees it. FSDP2 frees a parameter's
    storage by resizing it to nothing.

    Args:
        classes: Size of the last dimension of logits, or None if there are none.
        block: Bytes to which an allocation is rounded.
        is_gloo: Whether to count what gloo allocates during a collective.
    """

    def __init__(self, classes: int | None = None, block: int = BLOCK, is_gloo: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.counter = Counter()
        self._classes, self._block, self._is_gloo = classes, block, is_gloo
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._serials: dict[int, int] = {}
        self._labels: list[str] = []
        """Part of each storage, by serial number."""
        self._log: list[tuple[int, int]] = []
        """Serial numbers of storages, and the bytes by which they grew."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_gloo and func.namespace in _COLLECTIVES:
            self.add(torch.empty(_staged(func, args, result), dtype=torch.uint8), BUCKETS)  # which is freed at once
        if self.counter.during is not None:
            self.counter.add(func, args, kwargs, result)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.add(one, source=(func, args))
        return result

    def add(self, tensor: Tensor, label: str | None = None, source: tuple[Any, Any] | None = None) -> None:
        """Count the storage of a tensor if it is new, or changed its size.

        Args:
            tensor: The tensor; of a DTensor this rank's part.
            label: Part of the memory to which it belongs; None: found from `source`.
            source: The operator that returned it, and its arguments.
        """
        for part in plain(tensor):
            if part.is_meta:  # DeepSpeed keeps the shapes of its parameters as such tensors
                continue
            storage = part.untyped_storage()
            if id(storage) not in self._sizes:
                self._start(storage, label or self._label_of(part, source))
            elif label is not None:
                self._labels[self._serials[id(storage)]] = label
            self._update(storage)

    def label(self, tensors: Iterable[Any], label: str) -> None:
        """Assign storages that are already known to a part of the memory, for their whole life."""
        for tensor in tensors:
            for part in plain(tensor) if isinstance(tensor, Tensor) else ():
                serial = self._serials.get(id(part.untyped_storage()))
                if serial is not None:
                    self._labels[serial] = label

    def mark(self) -> int:
        """Return the present place in the log, and begin a new peak."""
        self.peak = self.alive
        return len(self._log)

    def parts(self, begin: int, end: int | None = None) -> dict[str, int]:
        """Return the bytes of each part of the memory at the peak between two marks."""
        alive, peak, place = sum(grown for _, grown in self._log[:begin]), -1, begin
        if alive > peak:
            peak, place = alive, begin
        for index in range(begin, len(self._log) if end is None else end):
            alive += self._log[index][1]
            if alive > peak:
                peak, place = alive, index + 1
        sums: dict[str, int] = {}
        for serial, grown in self._log[:place]:
            sums[self._labels[serial]] = sums.get(self._labels[serial], 0) + grown
        return {part: size for part, size in sums.items() if size}

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Inside this context, see storages that are resized, which is no operator, and FSDP2's whole gradients."""
        original, reduce = torch.UntypedStorage.resize_, _fsdp_param_group.foreach_reduce

        def resize(storage: Any, size: int) -> None:
            original(storage, size)
            if id(storage) in self._sizes:
                self._update(storage)

        def reduced(parameters: Any, gradients: Any, *arguments: Any, **named: Any) -> Any:
            self.label(gradients, BUCKETS)
            return reduce(parameters, gradients, *arguments, **named)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize))
            stack.enter_context(mock.patch.object(_fsdp_param_group, "foreach_reduce", reduced))
            yield

    def _label_of(self, tensor: Tensor, source: tuple[Any, Any] | None) -> str:
        if _is_called_by_fsdp():
            return BUCKETS
        if source is not None and source[0] is torch.ops.aten._to_copy.default:
            (original,) = plain(source[1][0])
            serial = self._serials.get(id(original.untyped_storage()))
            if serial is not None and self._labels[serial] == PARAMETERS:
                return COPIES
        if self._classes is not None and tensor.dim() >= 2 and tensor.shape[-1] == self._classes:
            return LOGITS
        return REST

    def _start(self, storage: Any, label: str) -> None:
        key = id(storage)
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = 0
        self._serials[key] = len(self._labels)
        self._labels.append(label)

    def _update(self, storage: Any) -> None:
        key, size = id(storage), -(-storage.nbytes() // self._block) * self._block
        grown = size - self._sizes[key]
        if grown:
            self._sizes[key] = size
            self._grow(key, grown)

    def _forget(self, key: int) -> None:
        self._grow(key, -self._sizes[key])
        del self._references[key], self._sizes[key], self._serials[key]

    def _grow(self, key: int, grown: int) -> None:
        self.alive += grown
        self.peak = max(self.peak, self.alive)
        self._log.append((self._serials[key], grown))


def _staged(func: Any, args: Any, result: Any) -> int:
    """Return the bytes that gloo allocates during a collective."""
    names = [one.name for one in func._schema.arguments]
    place = next((names.index(one) for one in _GROUPS if one in names), None)
    if place is None:
        return 0
    sizes = [one.nbytes for one in tree_leaves((args, result)) if isinstance(one, Tensor)]
    return gloo.staged(func.overloadpacket.__name__, max(sizes, default=0), _ranks(args[place]))


def _ranks(group: Any) -> int:
    """Return the number of ranks of a group, which operators take by name or boxed."""
    if isinstance(group, str):
        group = distributed_c10d._resolve_process_group(cast(Any, group))  # NewType GroupName of str
    elif isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return int(group.size())


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor that holds the memory: of a DTensor its local part."""
    inner = getattr(tensor, "_local_tensor", None)
    yield tensor if inner is None else inner


def _is_called_by_fsdp() -> bool:
    """Return whether FSDP2 itself makes the tensor: gathered weights, buffers of its collectives."""
    frame: Any = sys._getframe(1)
    for _ in range(_CALLERS):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(_FSDP):
            return True
        frame = frame.f_back
    return False


_FSDP = ("_fsdp_collectives.py", "_fsdp_param.py", "_fsdp_param_group.py")


@contextmanager
def real_meshes() -> Iterator[None]:
    """Inside this context, device meshes have values, which their constructor reads."""
    original = DeviceMesh.__init__

    def init(mesh: DeviceMesh, *arguments: Any, **named: Any) -> None:
        with _disable_current_modes():
            original(mesh, *arguments, **named)

    with mock.patch.object(DeviceMesh, "__init__", init):
        yield


@contextmanager
def first_shards() -> Iterator[None]:
    """Inside this context, FSDP2 splits a parameter into rank 0's shard only: of 512 views it reads no other."""

    def first(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
        return [tensor.narrow(dim, 0, min(tensor.shape[dim], -(-tensor.shape[dim] // num_chunks)))]

    with mock.patch.object(_fsdp_param, "_chunk_with_empty", first):
        yield
