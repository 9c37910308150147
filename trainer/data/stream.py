"""Batches that come in an order that only their source knows: IterableDataset, batch samplers without a length, lists
of tensors, loaders with a `state_dict` of their own."""

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
    "give each rank its share in the dataset (torch.distributed.get_rank() and get_world_size()),"
    " as many batches as the others have"
)


def is_stateful(loader: Any) -> bool:
    """Whether it can save where it is, and continue there."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


class Stream:
    """A loader whose batches are counted, shared and found again after a resume.

    - Where every rank gets the same batches, rank r takes batches r, r + world_size, ...; where they differ, each
      rank has its share already, and the source is left as it is. The log says which.
    - Without a length, the epoch ends for all ranks where it ends for the first: a rank with a batch more than the
      others would wait for them for ever.
    - A resume gives a stateful source its own state, rank by rank. Any other is read again from the beginning of the
      epoch, up to the batch that comes next; it draws the same random numbers in each reading.

    What it is asked beside (`dataset`, `batch_size`, `sampler`) the source answers.
    """

    def __init__(self, source: Iterable[Any], ranks: Ranks, seed: int, name: str, is_shared: bool = False) -> None:
        """`name`: in messages. `is_shared`: each rank has its share, nobody looks (`use_distributed_sampler=false`)."""
        self.source, self.ranks, self.seed, self.name = source, ranks, seed, name
        self._on_batch: Callable[[int, int, list[Any]], None] | None = None
        self._first: tuple[int, int, Any] | None = None
        """The first batch, which Lightning may fetch before anybody asks for `on_batch`."""
        self.not_trained: Callable[[], int] = int
        """How many batches were handed out that nobody has trained on yet: Lightning fetches one ahead of the training
        to see the end of what has no length."""
        self.epoch_is_over: Callable[[], bool] = bool
        self._is_stateful, self._repeats = is_stateful(source), not isinstance(source, Iterator)
        self._stride = 1 if is_shared or ranks.world_size == 1 else None
        self._length: int | None = None
        self._epoch = self._delivered = self._total = 0
        self._sought = self._has_state = self._has_begun = self._said_uneven = False
        self.fetches_ahead = True
        """Whether batches may be read that the training has not come to."""
        self._states: dict[int, Any] = {}
        """Batches read in this iteration to the state of the source after them; the newest few."""
        self._begun: tuple[int, Iterator[Any], Any] | None = None
        """The epoch, an iterator and its first batch, which was looked at."""
        self._generators = OwnGenerators()
        self._saved_generators: Any = None
        # torchdata's are in the middle of the epoch once they are iterated; others may read up to there with the batch
        # that comes next, and need the random numbers of the epoch's beginning.
        self._continues_inside = any(kind.__module__.startswith("torchdata.") for kind in type(source).__mro__)
        self._draws_here = not (isinstance(source, DataLoader) and source.num_workers > 0)

    @property
    def on_batch(self) -> Callable[[int, int, list[Any]], None] | None:
        """Called with (epoch, number of the batch in it, [what tells one batch from another])."""
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
        """Batches of an epoch. Raises TypeError where the source has no length."""
        length = len(self.source)  # type: ignore[arg-type]
        if self._length is None:
            shortest = self.ranks.least(length)
            assert shortest is not None
            self._length = shortest // self._stride_of()
        return self._length

    def __iter__(self) -> Iterator[Any]:
        if not self._sought and self._delivered:
            self._epoch, self._delivered = self._epoch + 1, 0
        self._sought = False
        self._states.clear()
        for batch in self._ending_together(self._shared()):
            self._first = None if self._has_begun else (self._epoch, self._delivered, batch)
            self._has_begun = True
            if self._on_batch is not None:
                self._on_batch(self._epoch, self._delivered, [digest_of(batch)])
            self._delivered, self._total = self._delivered + 1, self._total + 1
            yield batch

    def _shared(self) -> Iterator[Any]:
        """This rank's batches."""
        stride, mine = self._stride_of(), None
        read, place = self._delivered, self.ranks.rank if self._stride != 1 else 0
        for number, batch in enumerate(self._reading(stride)):
            if number % stride == place:
                mine = batch
            if number % stride == stride - 1:
                read += 1
                self._remember(read)
                yield mine

    def _reading(self, stride: int) -> Iterator[Any]:
        """The source's own batches, from the one that comes next."""
        skipped = 0 if self._has_state else stride * (self._delivered if self._repeats else self._total)
        ends = 0 if self._repeats else self._epoch
        begun, self._begun = self._begun, None
        if begun is None or (begun[0] != self._epoch and self._repeats):
            begun = self._opened()
        _, iterator, ahead = begun
        self._has_state = False
        if skipped and self.ranks.rank == 0:
            _log.warning("%s: reading %d batches again, up to where the training stopped", self.name, skipped)
        while ahead is not _END or ends:
            if ahead is _END:
                ends -= 1
            elif skipped:
                skipped -= 1
            else:
                yield ahead
            ahead = self._next(iterator)

    def _opened(self) -> tuple[int, Iterator[Any], Any]:
        """The epoch, an iterator over the source, where its state is if it has one, and the first batch."""
        iterator = self._iterator()
        if self._has_state and self._delivered and self._continues_inside and self._saved_generators is not None:
            self._generators = OwnGenerators.of(self._saved_generators)
        first = self._next(iterator)
        if first is _END and self._has_state and not self._delivered:  # its state was that of an epoch's end
            iterator = self._iterator()
            first = self._next(iterator)
        return self._epoch, iterator, first

    def _iterator(self) -> Iterator[Any]:
        """A new one; its random numbers are a function of the seed and the epoch, and the same on every rank."""
        with generators_untouched():
            seed_sample(self.seed, self._epoch, 0)
            iterator = iter(self.source)
            self._generators = OwnGenerators()
        return iterator

    def _next(self, iterator: Iterator[Any]) -> Any:
        if not self._draws_here:
            return next(iterator, _END)
        with self._generators.inside():
            return next(iterator, _END)

    def _stride_of(self) -> int:
        """Batches of which a rank takes one; decided by the first batch."""
        if self._stride is None:
            self._begun = self._opened()
            first = self._begun[2]
            shares = self.ranks.compare(None if first is _END else first, self.name)
            self._stride = self.ranks.world_size if shares is Shares.SAME else 1
            if self.ranks.rank == 0:
                _log.warning(
                    "%s: each rank reads its own batches; they are left as they are"
                    if shares is Shares.OWN
                    else "%s: every rank reads the same batches, so each takes one in turn; to read less, " + SHARE_IT,
                    self.name,
                )
            self._look_at_workers()
        return self._stride

    def _look_at_workers(self) -> None:
        """Warn where each worker process reads the whole stream: the ranks' turns are then turns of the workers, and
        what one rank reads another reads, too. The second batch is the second worker's first."""
        workers = getattr(self.source, "num_workers", 0)
        if self._begun is None or workers < 2 or self._is_stateful or self._stride == 1:
            return
        epoch, iterator, first = self._begun
        second = self._next(iterator)
        if second is _END:
            return
        self._begun = epoch, itertools.chain([second], iterator), first
        if self.ranks.rank == 0 and digest_of(first) == digest_of(second):
            _log.warning(
                "%s: its %d worker processes read the same samples, each of them all; give each its share by"
                " torch.utils.data.get_worker_info(), or set num_workers=1",
                *(self.name, workers),
            )

    def _ending_together(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self.ranks.world_size == 1:
            yield from batches
            return
        try:
            length = len(self)
        except (TypeError, NotImplementedError):
            length = None
        if length is not None:
            yield from self._as_long_as(batches, length)
            return
        ahead = next(batches, _END)
        question = self.ranks.ask(ahead is not _END)
        while question.answer():
            batch, ahead = ahead, next(batches, _END)
            question = self.ranks.ask(ahead is not _END)
            yield batch
        have_more = self.ranks.gather(ahead is not _END)
        if any(have_more) and self.ranks.rank == 0 and not self._said_uneven:
            self._said_uneven, rank = True, have_more.index(False)
            _log.warning(
                "%s: rank %d has no batch after %d, others have more: the epoch ends here for all ranks; %s",
                *(self.name, rank, self._delivered, SHARE_IT),
            )

    def _as_long_as(self, batches: Iterator[Any], length: int) -> Iterator[Any]:
        count = self._delivered
        for batch in batches:
            count += 1
            yield batch
            if count >= length:
                return
        if count < length:
            raise UserError(
                f"{self.name} ended after {count} batches, its length is {length}: the other ranks would wait for ever",
                f"correct its __len__, or leave it out; {SHARE_IT}",
            )

    def _remember(self, read: int) -> None:
        """Keep the source's state after `read` batches: it may be ahead of the training when that is saved."""
        if self._is_stateful and self.fetches_ahead:
            self._states[read] = self._state_now()
            self._states.pop(read - 4, None)

    def _state_now(self) -> dict[str, Any]:
        generators = self._generators.plain() if self._draws_here else None
        return {"source": self.source.state_dict(), "generators": generators}  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The position; of a stateful source the states of all ranks. Collective."""
        behind = self.not_trained()
        epoch, delivered, total = self._epoch, self._delivered - behind, self._total - behind
        state: dict[str, Any] = {"total": total}
        if self._is_stateful:
            state["ranks"] = self.ranks.gather(self._plain_state(delivered))
        if self.epoch_is_over() and delivered:
            epoch, delivered = epoch + 1, 0
        return {"epoch": epoch, "step": delivered, "batches": delivered, **state}

    def _plain_state(self, delivered: int) -> Any:
        try:
            return plain(self._states.get(delivered) or self._state_now())
        except TypeError as error:
            _log.warning(
                "%s: its state_dict holds %s, which no checkpoint keeps; a resume reads again", self.name, error
            )
            self._is_stateful = False
            return None

    def begin_with(self, epoch: int) -> None:
        """Make the next iteration the one of this epoch, from its beginning."""
        self._epoch, self._delivered = epoch, 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "epoch" not in state:  # the source's own, of a checkpoint that Lightning's loops wrote
            if self._is_stateful:
                self.source.load_state_dict(state)  # type: ignore[attr-defined]
                self._has_state, self._begun = True, None
            return
        self._epoch, self._delivered = state["epoch"], state.get("batches", state["step"])
        self._total, self._sought = state.get("total", self._delivered), True
        states = state.get("ranks") or []
        if not self._is_stateful or any(one is None for one in states):
            return
        if len(states) != self.ranks.count():
            _log.warning(
                "%s: its state was saved by %d ranks, now there are %d: it begins its epoch again",
                *(self.name, len(states), self.ranks.count()),
            )
            self._delivered = 0
            return
        own = restored(states[self.ranks.number()])
        self.source.load_state_dict(own["source"])  # type: ignore[attr-defined]
        self._has_state, self._saved_generators, self._begun = True, own["generators"], None
