"""Counts the bytes that tensors hold while a step runs on fake tensors, which have shapes and no values.

Fake tensors on the CPU stand for those of a GPU: this needs no GPU and no memory. What differs on a GPU is added
(`as_on_cuda`): CUDA's autocast computes norms and the loss in float32. Not counted: CUDA's context (about 0.5 GB),
workspaces of cuBLAS, NCCL's buffers, and memory that torch's allocator reserves but cannot use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""Bytes to which torch's allocator rounds an allocation."""


class Tracked(TorchDispatchMode):
    """Sums the sizes of all storages that operators have made and that are still alive.

    A storage is known from the first operator that returns it, and gone when torch frees it. FSDP2 frees a parameter's
    storage by resizing it to nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.add(one)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor if it is new, or changed its size."""
        for part in _plain(tensor):
            self._update(part.untyped_storage())

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Inside this context, see storages that are resized, which is no operator."""
        original = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> None:
            original(storage, size)
            if id(storage) in self._sizes:
                self._update(storage)

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def _update(self, storage: Any) -> None:
        key, size = id(storage), -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.alive += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self.alive -= self._sizes.pop(key)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    inner = getattr(tensor, "_local_tensor", None)  # DTensor
    yield tensor if inner is None else inner


@contextmanager
def real_meshes() -> Iterator[None]:
    """Inside this context, device meshes have values, which their constructor reads."""
    original = DeviceMesh.__init__

    def init(mesh: DeviceMesh, *arguments: Any, **named: Any) -> None:
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            original(mesh, *arguments, **named)

    with mock.patch.object(DeviceMesh, "__init__", init):
        yield


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside this context, autocast treats norms and the loss as CUDA's does.

    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/autocast_mode.h
    """
    names = ("layer_norm", "rms_norm", "cross_entropy")
    with mock.patch.multiple(functional, **{name: _in_float32(getattr(functional, name)) for name in names}):
        yield


def _in_float32(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(*arguments: Any, **named: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return original(*arguments, **named)
        arguments, named = (torch.utils._pytree.tree_map_only(Tensor, _float, values) for values in (arguments, named))
        return original(*arguments, **named)

    return function


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
