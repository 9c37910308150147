"""The peak of what the C library's allocator holds in a rank, for `planned_memory.py`, which copies this file."""

from __future__ import annotations

import ctypes
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_held = ctypes.CDLL(None)  # with what is preloaded
_held.held_now.restype = _held.held_peak.restype = ctypes.c_long


class _Watch(TorchDispatchMode):
    """Leaves out of the peak what an operator allocates and frees within itself, unless it is a collective.

    What a collective stages is the process's as much as a tensor. gloo's thread frees it after the collective has
    ended, which is at once unless the ranks compete for cores: so the next operator waits for that.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        end = time.monotonic() + _STAGED_S
        while _held.held_staged() and time.monotonic() < end:
            time.sleep(0)
        _held.held_settle()
        is_collective = func.namespace in _COLLECTIVES
        _held.held_enter(int(is_collective))
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            _held.held_leave()
        for one in tree_leaves(result) if is_collective else ():
            if isinstance(one, torch.Tensor):
                _held.held_keep(ctypes.c_void_p(_storage(one).data_ptr()))
        return result


_COLLECTIVES = ("c10d", "_c10d_functional")
_STAGED_S = 1.0


class Peak(Callback):
    """Writes the peak of memory of rank 0 in an optimizer step.

    Args:
        output: JSON file to write: `peak` in bytes.
        step: Number of the optimizer step, from 0.
    """

    def __init__(self, output: str, step: int) -> None:
        self._output, self._step = Path(output), step
        self._watch: _Watch | None = None
        self._data: set[int] = set()
        self._before = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remember the tensors that are not the model's: the data set."""
        model = {storage.data_ptr() for storage in map(_storage, (*pl_module.parameters(), *pl_module.buffers()))}
        self._data = set(_tensors()) - model

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to watch with the first micro-batch of the step.

        Lightning has not deleted the gradients of the step before, which in ddp are views of the Reducer's buckets: so
        all that is held is a tensor that Python can see, or belongs to a library of kernels.
        """
        if trainer.global_step == self._step and self._watch is None:
            tensors = sum(size for address, size in _tensors().items() if address not in self._data)
            self._before = _held.held_now() - tensors
            _held.held_begin()
            self._watch = _Watch()
            self._watch.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the peak when the step has been made."""
        if trainer.global_step == self._step + 1 and self._watch is not None:
            self._watch.__exit__(None, None, None)
            if trainer.is_global_zero:
                self._output.write_text(json.dumps({"peak": _held.held_peak() - self._before}))
            self._watch = None


def _tensors() -> dict[int, int]:
    """Return the address and the bytes of each block that a tensor of this process holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated attributes of whatever is alive
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(_storage, tensors)}
    return {address: size for address, size in storages.items() if size >= SMALLEST}


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    for name in ("_local_tensor", "elem"):  # of a DTensor, and of one that a collective has not filled yet
        tensor = getattr(tensor, name, tensor)
    return tensor.untyped_storage()


SMALLEST = 1 << 14
"""Bytes, as in `planned_memory_held.c`."""
