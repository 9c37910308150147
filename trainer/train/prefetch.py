"""Copy the next batch to the GPU on a side stream while the current step computes (`trainer.prefetch_to_device`).

The batch that is ahead waits in `fetcher.batches`, where Lightning keeps what it has fetched and not handed out. So the
position of the data, which a checkpoint saves, counts it as not trained on (`train/data.py`), and Lightning's own loop
finds it there if it takes over in mid-epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch import Tensor

from trainer.data.loader import Ordered

_PLAIN = (str, bytes, int, float, bool, type(None))
"""Types in a batch that stay on the host."""


class CopyStream:
    """A CUDA stream for copies from host memory, beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, tensor: Tensor) -> Tensor:
        """Start a copy of `tensor` to the device, from pinned memory: only then it does not block."""
        if tensor.device.type != "cpu":
            return tensor
        with torch.cuda.stream(self._stream):
            return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)

    def wait(self) -> None:
        """Have the stream that computes wait for all copies that were started."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def keep(self, tensor: Tensor) -> None:
        """Note that the stream that computes uses `tensor`: its memory is not reused before that is done."""
        if tensor.device.type != "cpu":
            tensor.record_stream(torch.cuda.current_stream(self._device))


class Prefetcher:
    """Hands out the batches of an epoch in order, one of them ahead on the device."""

    def __init__(
        self, fetcher: _PrefetchDataFetcher, fetch: Callable[[], Any], stream: CopyStream, most: float
    ) -> None:
        """Prefetch from a fetcher that knows its length.

        Args:
            fetcher: Lightning's fetcher.
            fetch: Returns its next batch (`loop_plan._make_fetch`).
            stream: Copies to the device.
            most: Batches of the epoch that are trained on; no further one is fetched.
        """
        assert fetcher.length is not None
        self._fetcher, self._fetch, self._stream = fetcher, fetch, stream
        self._length = fetcher.length
        self._most = min(most, fetcher.length)
        self._iterator = fetcher.combined_loader._iterator
        self._ended = False

    def is_current(self, fetcher: Any) -> bool:
        """Return whether this prefetcher reads the iteration that `fetcher` is in."""
        return fetcher is self._fetcher and fetcher.combined_loader._iterator is self._iterator

    def next_batch(self) -> Any:
        """Return the next batch, and start the copy of the one after it.

        The step before has been queued on the device then, and computes meanwhile.

        Raises:
            StopIteration: The epoch is over.
        """
        fetcher = self._fetcher
        ahead = fetcher.batches
        if not ahead:
            self._load()
        batch = ahead.pop(0)[0]
        self._stream.wait()
        _tensors(batch, self._stream.keep)
        if not self._ended and fetcher.fetched < self._most:
            try:
                self._load()
            except StopIteration:  # fewer batches than the loader's length
                self._ended = True
        fetcher.done = not ahead and (self._ended or fetcher.fetched >= self._length)
        return batch

    def settle(self) -> None:
        """Leave the batch that is ahead to Lightning's own loop."""
        self._stream.wait()

    def _load(self) -> None:
        batch = self._fetch()
        self._fetcher.batches.append((_tensors(batch, self._stream.copy) if _is_plain(batch) else batch, 0, 0))


def make(
    current: Prefetcher | None, trainer: Trainer, fetcher: Any, fetch: Callable[[], Any], stream: CopyStream
) -> Prefetcher | None:
    """Return the prefetcher of this iteration; None if this loader cannot be read ahead.

    Only our own loaders can: their random numbers are a function of the sample, not of when it is read.
    """
    if current is not None and current.is_current(fetcher):
        return current
    combined = fetcher.combined_loader
    is_ours = combined._spec.is_leaf() and isinstance(combined.flattened[0], Ordered)
    if type(fetcher) is not _PrefetchDataFetcher or fetcher.length is None or fetcher.batches or not is_ours:
        return None
    return Prefetcher(fetcher, fetch, stream, trainer.fit_loop.max_batches)


def _is_plain(batch: Any) -> bool:
    """Return whether a batch holds nothing but tensors and values of the host, in tuples, lists and dictionaries."""
    kind = type(batch)
    if kind in (tuple, list):
        return all(map(_is_plain, batch))
    if kind is dict:
        return all(map(_is_plain, batch.values()))
    return kind is Tensor or kind in _PLAIN


def _tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return a batch with `function` applied to its tensors."""
    kind = type(batch)
    if kind in (tuple, list):
        return kind([_tensors(one, function) for one in batch])
    if kind is dict:
        return {key: _tensors(value, function) for key, value in batch.items()}
    return function(batch) if kind is Tensor else batch
