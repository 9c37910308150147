"""Copies of tensors in host memory, so that training continues while they are written to disk.

Two ways, chosen by `choose`. A snapshot copies everything before training continues: it needs as much host memory as
this rank's part of the checkpoint. Where that is not free, the tensors are streamed to the file one after the other
through one buffer, and training waits until the last one has been read.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trainer.core.host_memory import available_bytes

log = logging.getLogger(__name__)

MIB = 2**20
KEPT_FREE = 0.1
"""Share of the free host memory that a snapshot leaves: for loader workers, page cache, and what other ranks do."""
_SMALL_BYTES = MIB
"""Smaller buffers come from torch's pool of pinned memory, which rounds sizes up to a power of two, and are copied by
the calling thread."""
_PIECE_BYTES = 16 * MIB


@dataclass(frozen=True)
class CopyOptions:
    """How the state reaches the disk: `checkpoint.snapshot` and `checkpoint.buffer_mb`."""

    snapshot: Literal["auto", "full", "streamed"] = "auto"
    buffer_bytes: int = 256 * MIB
    ranks_on_node: int = 1
    """Ranks that save at the same time on this node, each its own part."""


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether the tensor has to be copied to reach a file."""
    return tensor.device.type != "cpu"


class HostBuffers:
    """Host memory that is allocated once and filled at each save.

    Nothing is cloned on the GPU, where the optimizer's state may be the larger part of the memory. With CUDA the
    buffers are pinned: the copies run at the speed of the link and need one synchronization at the end. Do not fill the
    buffers while their previous content is still being written.

    What is in host memory already is copied by threads of our own, with memmove. Tensor.copy_ divides each tensor among
    OpenMP's threads, which wait for each other at its end: beside other work it took 4 to 7 times the CPU time.

    Args:
        threads: Threads that copy in host memory.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._moves: list[Future[Any]] = []
        self._moved: list[torch.Tensor] = []
        """The tensors that are being copied, which must not be freed."""
        self._buffers: dict[str, torch.Tensor] = {}
        self._memory: dict[str, torch.Tensor] = {}
        """What `allocate` returned for each of `_buffers`, which are views of it."""
        self._copied: dict[tuple[object, ...], torch.Tensor] = {}
        self._used: set[str] = set()
        self._waiting: set[torch.device] = set()

    @property
    def nbytes(self) -> int:
        """Host memory that the buffers take."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self, where: str, tensor: torch.Tensor) -> torch.Tensor:
        """Start copying `tensor` into the buffer named `where`, and return the buffer.

        The buffer holds the values once `finish` has returned. Tensors that share memory (tied embeddings) share one
        buffer, and so one entry in the file.
        """
        tensor = tensor.detach()
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in self._copied:
            return self._copied[memory]
        buffer = self._buffers.get(where)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            self._buffers.pop(where, None)
            self._memory.pop(where, None)
            self._memory[where] = allocate(tensor.nbytes, tensor.device)
            self._buffers[where] = buffer = _as(self._memory[where], tensor)
        if _is_plain_memory(tensor) and tensor.nbytes >= _SMALL_BYTES:
            self._move(buffer, tensor)
        else:
            buffer.copy_(tensor, non_blocking=tensor.device.type == "cuda")
        if tensor.device.type == "cuda":
            self._waiting.add(tensor.device)
        self._used.add(where)
        self._copied[memory] = buffer
        return buffer

    def finish(self) -> None:
        """Wait until all copies of this save are complete, and free the buffers that it did not use."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for move in self._moves:
            move.result()
        self._moves.clear()
        self._moved.clear()
        for device in self._waiting:
            torch.cuda.current_stream(device).synchronize()
        for where in self._buffers.keys() - self._used:
            del self._buffers[where], self._memory[where]
        self._waiting.clear()
        self._copied.clear()
        self._used.clear()

    def _move(self, buffer: torch.Tensor, tensor: torch.Tensor) -> None:
        """Start copying in host memory, in pieces, so that the threads share one large tensor, too."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "checkpoint-copy")
        self._moved.append(tensor)
        target, source = buffer.data_ptr(), tensor.data_ptr()
        for begin in range(0, tensor.nbytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, tensor.nbytes - begin)
            self._moves.append(self._pool.submit(ctypes.memmove, target + begin, source + begin, size))


class StreamBuffer:
    """One host buffer through which the tensors of a save pass one after the other."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._bytes: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Host memory that the buffer takes: none until the first tensor that is on a device."""
        return 0 if self._bytes is None else self._bytes.nbytes

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of `tensor` on the host, which the next call overwrites; a tensor on the host as it is.

        The copy has a storage of its exact size, which torch.distributed.checkpoint would otherwise copy once more. A
        tensor that is larger than the buffer enlarges it.
        """
        if not is_on_device(tensor) or tensor.numel() == 0:
            return tensor
        if self.nbytes < tensor.nbytes:
            self._bytes = None  # freed before the larger one is allocated
            self._bytes = allocate(max(self.size_bytes, tensor.nbytes), tensor.device)
        assert self._bytes is not None
        return _as(torch.from_numpy(self._bytes.numpy()[: tensor.nbytes]), tensor).copy_(tensor)


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    """Return whether the values of a tensor are the bytes that it names in host memory."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _as(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `memory` as a tensor of the shape and type of `tensor`."""
    return memory.view(tensor.dtype).view(tensor.shape)


def allocate(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Return host memory for a copy from `device`; pinned for CUDA.

    Torch's pool of pinned memory rounds each size up to a power of two: 4 GiB for an embedding of 2.1 GB. So larger
    buffers are allocated at their size and registered with CUDA.
    """
    if device.type != "cuda":
        return torch.empty(size_bytes, dtype=torch.uint8)
    if size_bytes < _SMALL_BYTES:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    buffer = torch.empty(size_bytes, dtype=torch.uint8)
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = buffer.data_ptr()
    if int(cudart.cudaHostRegister(address, size_bytes, 1)) != 0:  # 1: cudaHostRegisterPortable
        log.warning("%d MiB of host memory could not be pinned; copies of it are slower", size_bytes // MIB)
        return buffer
    weakref.finalize(buffer, cudart.cudaHostUnregister, address).atexit = False  # CUDA may have ended by then
    return buffer


def choose(
    options: CopyOptions,
    needed_bytes: int,
    held_bytes: int,
    free: Callable[[], int | None] = available_bytes,
) -> Literal["full", "streamed"]:
    """Return how to save.

    Args:
        options: What is configured; `auto` takes a snapshot if it fits in free host memory.
        needed_bytes: Size of this rank's part.
        held_bytes: Size of the buffers that are allocated already.
        free: Returns the free host memory in bytes; None: not known, and a snapshot is taken.
    """
    if options.snapshot != "auto":
        return options.snapshot
    more_bytes = (needed_bytes - held_bytes) * options.ranks_on_node
    if more_bytes <= 0:
        return "full"
    free_bytes = free()
    return "full" if free_bytes is None or more_bytes <= free_bytes * (1 - KEPT_FREE) else "streamed"


def nbytes(tree: object) -> int:
    """Return the size in bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(nbytes(item) for item in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(nbytes(item) for item in tree)
    return 0
