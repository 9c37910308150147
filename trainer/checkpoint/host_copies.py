"""Copies of tensors in host memory, so that training continues while they are written to disk."""

from __future__ import annotations

import torch


class HostBuffers:
    """Host memory that is allocated once and filled at each save.

    Nothing is cloned on the GPU, where the optimizer's state may be the larger part of the memory. With CUDA the
    buffers are pinned: the copies run at the speed of the link and need one synchronization at the end. Do not fill the
    buffers while their previous content is still being written.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: dict[tuple[object, ...], torch.Tensor] = {}
        self._waiting: set[torch.device] = set()

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
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._buffers[where] = buffer
        buffer.copy_(tensor, non_blocking=tensor.device.type == "cuda")
        if tensor.device.type == "cuda":
            self._waiting.add(tensor.device)
        self._copied[memory] = buffer
        return buffer

    def finish(self) -> None:
        """Wait until all copies of this save are complete."""
        for device in self._waiting:
            torch.cuda.current_stream(device).synchronize()
        self._waiting.clear()
        self._copied.clear()


def nbytes(tree: object) -> int:
    """Return the size in bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(nbytes(item) for item in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(nbytes(item) for item in tree)
    return 0
