"""Batches in an order that only their source knows.

IterableDataset, batch samplers without a length, lists of tensors, loaders with their own `state_dict`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from trainer.core.errors import UserError
from trainer.data.plain_state import plain, restored
from trainer.data.randomness import OwnGenerators, generators_untouched, seed_sample
from trainer.data.ranks import Ranks, Shares, digest_of

_log = logging.getLogger(__name__)
_END = object()
SHARE_IT = (
    "shard the dataset by rank (torch.distributed.get_rank() and get_world_size()),"
    " with the same number of batches on each rank"
)
"""The fix that several messages suggest."""


def is_stateful(loader: Any) -> bool:
    """Return whether the loader can save its position and restore it."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


class Stream:
    """A loader whose batches are counted, shared between the ranks and restored on a resume.

    - If every rank gets the same batches, rank r takes batches r, r + world_size, ... If they differ, each rank already
      has its share, and the source is left unchanged. The log shows which.
    - Without a length, the epoch ends for all ranks when the first has no batch left: a rank with one batch more than
      the others would wait for them forever.
    - On a resume, a stateful source gets its own state, rank by rank. Any other source is read again from the beginning
      of the epoch up to the next batch; it draws the same random numbers each time.

    Other attributes (`dataset`, `batch_size`, `sampler`) are those of the source.

    While a batch is read, Python's, NumPy's and torch's generators are replaced by the source's own. A source that
    draws no random numbers may set `random = False`: then they are not.

    Args:
        source: The user's loader.
        ranks: This rank's position among the data-parallel ranks.
        seed: Seed of the run.
        name: Name of the source in messages.
        is_shared: Each rank already has its share; skip the comparison (`use_distributed_sampler=false`).
    """

    def __init__(self, source: Iterable[Any], ranks: Ranks, seed: int, name: str, is_shared: bool = False) -> None:
        self.source, self.ranks, self.seed, self.name = source, ranks, seed, name
        self._on_batch: Callable[[int, int, list[Any]], None] | None = None
        self._first: tuple[int, int, Any] | None = None
        """The first batch, which Lightning may fetch before `on_batch` is set."""
        self.not_trained: Callable[[], int] = int
        """Returns the number of batches handed out but not trained on yet.

        Lightning fetches one batch ahead of the training to detect the end of a loader without a length.
        """
        self.epoch_is_complete: Callable[[], bool] = bool
        """Returns whether the training's epoch is complete."""
        self._is_stateful, self._repeats = is_stateful(source), not isinstance(source, Iterator)
        self._stride = 1 if is_shared or ranks.world_size == 1 else None
        self._length: int | None = None
        self._epoch = self._delivered = self._total = 0
        self._sought = self._has_state = self._has_begun = self._warned_uneven = False
        self.fetches_ahead = True
        """Whether batches may be read ahead of the training."""
        self._states: dict[int, Any] = {}
        """Number of batches read in this iteration to the state of the source after them; the newest few."""
        self._opened: tuple[int, Iterator[Any], Any] | None = None
        """The epoch, an iterator, and its first batch, which was peeked at."""
        self._generators = OwnGenerators()
        self._saved_generators: Any = None
        # torchdata's loaders are in mid-epoch once they are iterated. Others may read up to there together with the
        # next batch, and need the random numbers of the epoch's beginning.
        self._continues_inside = any(kind.__module__.startswith("torchdata.") for kind in type(source).__mro__)
        may_draw = getattr(source, "random", True) is not False
        self._draws_here = may_draw and not (isinstance(source, DataLoader) and source.num_workers > 0)

    @property
    def on_batch(self) -> Callable[[int, int, list[Any]], None] | None:
        """Called with (epoch, index of the batch in it, [digest of the batch])."""
        return self._on_batch

    @on_batch.setter
    def on_batch(self, called: Callable[[int, int, list[Any]], None] | None) -> None:
        self._on_batch = called
        if called is not None and self._first is not None:
            called(*self._first[:2], [digest_of(self._first[2])])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        """Return the batches of an epoch.

        Raises:
            TypeError: The source has no length.
        """
        length = len(self.source)  # type: ignore[arg-type]
        if self._length is None:
            shortest = self.ranks.minimum(length)
            assert shortest is not None
            self._length = shortest // self._get_stride()
        return self._length

    def __iter__(self) -> Iterator[Any]:
        if not self._sought and self._delivered:
            self._epoch, self._delivered = self._epoch + 1, 0
        self._sought = False
        self._states.clear()
        batches = self._own_batches()
        for batch in batches if self.ranks.world_size == 1 else self._end_together(batches):
            self._first = None if self._has_begun else (self._epoch, self._delivered, batch)
            self._has_begun = True
            if self._on_batch is not None:
                self._on_batch(self._epoch, self._delivered, [digest_of(batch)])
            self._delivered, self._total = self._delivered + 1, self._total + 1
            yield batch

    def _own_batches(self) -> Iterator[Any]:
        """Yield this rank's batches."""
        stride, mine = self._get_stride(), None
        read, turn = self._delivered, self.ranks.rank if self._stride != 1 else 0
        for number, batch in enumerate(self._source_batches(stride)):
            if number % stride == turn:
                mine = batch
            if number % stride == stride - 1:
                read += 1
                if self._is_stateful:
                    self._remember(read)
                yield mine

    def _source_batches(self, stride: int) -> Iterator[Any]:
        """Yield the source's own batches, from the next one."""
        skipped = 0 if self._has_state else stride * (self._delivered if self._repeats else self._total)
        ends = 0 if self._repeats else self._epoch
        opened, self._opened = self._opened, None
        if opened is None or (opened[0] != self._epoch and self._repeats):
            opened = self._open()
        _, iterator, ahead = opened
        self._has_state = False
        if skipped and self.ranks.rank == 0:
            _log.warning("%s: reading %d batches again to reach the position of the checkpoint", self.name, skipped)
        while ahead is not _END or ends:
            if ahead is _END:
                ends -= 1
            elif skipped:
                skipped -= 1
            else:
                yield ahead
            ahead = self._next(iterator)

    def _open(self) -> tuple[int, Iterator[Any], Any]:
        """Return the epoch, an iterator over the source (at its restored state, if any), and the first batch."""
        iterator = self._iterator()
        if self._has_state and self._delivered and self._continues_inside and self._saved_generators is not None:
            self._generators = OwnGenerators.from_plain(self._saved_generators)
        first = self._next(iterator)
        if first is _END and self._has_state and not self._delivered:  # the state was saved at the end of an epoch
            iterator = self._iterator()
            first = self._next(iterator)
        return self._epoch, iterator, first

    def _iterator(self) -> Iterator[Any]:
        """Return a new iterator; its random numbers are a function of (seed, epoch), the same on every rank."""
        with generators_untouched():
            seed_sample(self.seed, self._epoch, 0)
            iterator = iter(self.source)
            self._generators = OwnGenerators()
        return iterator

    def _next(self, iterator: Iterator[Any]) -> Any:
        if not self._draws_here:
            return next(iterator, _END)
        with self._generators:
            return next(iterator, _END)

    def _get_stride(self) -> int:
        """Return the stride at which a rank takes batches of the source; comparing the first batch decides."""
        if self._stride is None:
            self._opened = self._open()
            first = self._opened[2]
            shares = self.ranks.compare(None if first is _END else first, self.name)
            self._stride = self.ranks.world_size if shares is Shares.SAME else 1
            if self.ranks.rank == 0:
                _log.warning(
                    "%s: each rank reads different batches; they are not sharded again"
                    if shares is Shares.OWN
                    else "%s: every rank reads the same batches, so they take turns; to read less, " + SHARE_IT,
                    self.name,
                )
            self._warn_of_duplicate_workers()
        return self._stride

    def _warn_of_duplicate_workers(self) -> None:
        """Warn if each worker process reads the whole stream.

        The ranks' turns then coincide with turns of the workers, so that several ranks read the same samples. The
        second batch is the first one of the second worker.
        """
        workers = getattr(self.source, "num_workers", 0)
        if self._opened is None or workers < 2 or self._is_stateful or self._stride == 1:
            return
        epoch, iterator, first = self._opened
        second = self._next(iterator)
        if second is _END:
            return
        self._opened = epoch, itertools.chain([second], iterator), first
        if self.ranks.rank == 0 and digest_of(first) == digest_of(second):
            _log.warning(
                "%s: each of its %d worker processes reads all samples; shard the dataset by worker"
                " (torch.utils.data.get_worker_info()), or set num_workers=1",
                *(self.name, workers),
            )

    def _end_together(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            length = len(self)
        except (TypeError, NotImplementedError):
            length = None
        if length is not None:
            yield from self._limit_to(batches, length)
            return
        ahead = next(batches, _END)
        check = self.ranks.start_check(ahead is not _END)
        while check.result():
            batch, ahead = ahead, next(batches, _END)
            check = self.ranks.start_check(ahead is not _END)
            yield batch
        have_more = self.ranks.gather(ahead is not _END)
        if any(have_more) and self.ranks.rank == 0 and not self._warned_uneven:
            self._warned_uneven, rank = True, have_more.index(False)
            _log.warning(
                "%s: rank %d has only %d batches, other ranks have more: the epoch ends here for all ranks; %s",
                *(self.name, rank, self._delivered, SHARE_IT),
            )

    def _limit_to(self, batches: Iterator[Any], length: int) -> Iterator[Any]:
        count = self._delivered
        for batch in batches:
            count += 1
            yield batch
            if count >= length:
                return
        if count < length:
            raise UserError(
                f"{self.name} ended after {count} batches, but its length is {length}: the other ranks would hang",
                f"correct or remove its __len__; {SHARE_IT}",
            )

    def _remember(self, read: int) -> None:
        """Keep the source's state after `read` batches: the source may be ahead of the training when that is saved."""
        if self.fetches_ahead:
            self._states[read] = self._state_now()
            self._states.pop(read - 4, None)

    def _state_now(self) -> dict[str, Any]:
        generators = self._generators.plain() if self._draws_here else None
        return {"source": self.source.state_dict(), "generators": generators}  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the states of all ranks if the source is stateful. Collective."""
        num_untrained = self.not_trained()
        epoch, delivered, total = self._epoch, self._delivered - num_untrained, self._total - num_untrained
        state: dict[str, Any] = {"total": total}
        if self._is_stateful:
            state["ranks"] = self.ranks.gather(self._plain_state(delivered))
        if self.epoch_is_complete() and delivered:
            epoch, delivered = epoch + 1, 0
        return {"epoch": epoch, "step": delivered, "batches": delivered, **state}

    def _plain_state(self, delivered: int) -> Any:
        try:
            return plain(self._states.get(delivered) or self._state_now())
        except TypeError as error:
            _log.warning(
                "%s: its state_dict holds %s, which a checkpoint cannot store; a resume reads the epoch again",
                *(self.name, error),
            )
            self._is_stateful = False
            return None

    def begin_with(self, epoch: int) -> None:
        """Start the next iteration at the beginning of `epoch`."""
        self._epoch, self._delivered = epoch, 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position, and the state of a stateful source."""
        if "epoch" not in state:  # the source's own state, from a checkpoint written by Lightning's loops
            if self._is_stateful:
                self.source.load_state_dict(state)  # type: ignore[attr-defined]
                self._has_state, self._opened = True, None
            return
        self._epoch, self._delivered = state["epoch"], state.get("batches", state["step"])
        self._total, self._sought = state.get("total", self._delivered), True
        states = state.get("ranks") or []
        if not self._is_stateful or any(one is None for one in states):
            return
        if len(states) != self.ranks.global_size():
            _log.warning(
                "%s: its state was saved by %d ranks, but there are %d: it restarts the epoch",
                *(self.name, len(states), self.ranks.global_size()),
            )
            self._delivered = 0
            return
        own = restored(states[self.ranks.global_rank()])
        self.source.load_state_dict(own["source"])  # type: ignore[attr-defined]
        self._has_state, self._saved_generators, self._opened = True, own["generators"], None
