"""What the C library's allocator holds in a rank, for `planned_memory.py`, which copies this file into its project."""

from __future__ import annotations

import ctypes
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later, mallinfo(3)."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


_mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
_mallinfo2.restype = _Mallinfo2


def held() -> int:
    """Return the bytes of all blocks that are at least as large as MALLOC_MMAP_THRESHOLD_ and not freed."""
    return int(_mallinfo2().hblkhd)


class _Watch(TorchDispatchMode):
    """Reads what is held after each operator."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, held())
        return result


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
            self._before = held() - tensors
            self._watch = _Watch()
            self._watch.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the peak when the step has been made."""
        if trainer.global_step == self._step + 1 and self._watch is not None:
            self._watch.__exit__(None, None, None)
            if trainer.is_global_zero:
                self._output.write_text(json.dumps({"peak": self._watch.peak - self._before}))
            self._watch = None


def _tensors() -> dict[int, int]:
    """Return the address and the bytes of each block that a tensor of this process holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated attributes of whatever is alive
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(_storage, tensors)}
    return {address: size for address, size in storages.items() if size >= SMALLEST}


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


SMALLEST = 1 << 14
"""MALLOC_MMAP_THRESHOLD_."""
