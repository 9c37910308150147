"""Windows of tokens, read from memory-mapped files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from torch.utils.data import Dataset

from trainer.core.errors import UserError
from trainer.data.order import Lookup
from trainer.data.shard_order import ShardOrder
from trainer.data.token_files import TokenFiles

IGNORED = -100
"""A target that the loss ignores, as in `trainer.tasks.language_modelling`."""
EVALUATION_TOKENS = 8192
"""Tokens per evaluation batch on a rank.

With 256 windows of 256 bytes a decoder of 3 million parameters took twice the CPU time: each activation is 64 MB, which
the allocator returns to the system and requests again.
"""


def evaluation_windows(sequence_length: int) -> int:
    """Return the number of windows per evaluation batch on a rank."""
    return max(1, EVALUATION_TOKENS // sequence_length)


class TokenWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of L = `sequence_length` tokens from one or more files of plain integers.

    Window i of a file has tokens [i*L, i*L+L) as input, and the tokens one position later as target: every token but
    the first is a target once per epoch, except fewer than L at the end of each file.

    Supports `gather`, see `seeded.SupportsGather`, and `lookup_order`, see `seeded.SupportsShuffle`.

    Args:
        files: The files, or the paths of files in one folder.
        sequence_length: Tokens per window.
        kind: Type of the integers.
        document_end: With `data.document_mask` the token that ends a document: it has no target, because the next
            token begins another document. None: every token has one.
        vocab_size: Number of ids, by which the tokens that are read are checked; None: not checked.

    Raises:
        UserError: The files hold fewer than `sequence_length + 1` tokens, or no whole number of tokens.
    """

    random = False

    def __init__(
        self,
        files: TokenFiles | Sequence[Path],
        sequence_length: int,
        kind: type[numpy.unsignedinteger],
        document_end: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if not isinstance(files, TokenFiles):
            folder = files[0].parent if files else Path()
            files = TokenFiles.local(folder, [path.name for path in files], kind)
        self.files = files
        can_exceed = vocab_size is not None and vocab_size <= numpy.iinfo(kind).max
        self.vocab_size = vocab_size if can_exceed else None
        self.windows = numpy.maximum(0, self.files.lengths - 1) // sequence_length
        """Windows of each file."""
        if not self.windows.sum():
            names = ", ".join(self.files.names[:3])
            raise UserError(
                f"{names or 'the data'}: {self.files.lengths.sum()} tokens, fewer than "
                f"data.sequence_length={sequence_length} + 1",
                "use a smaller data.sequence_length, or more text",
            )
        self.sequence_length, self.document_end = sequence_length, document_end
        self._ends = numpy.cumsum(self.windows)
        self._begins = self._ends - self.windows
        self._offsets = numpy.arange(sequence_length + 1)
        self._group: int | None = None
        self._prefetch: Callable[[Sequence[int], Sequence[int]], None] | None = None
        self._order: ShardOrder | None = None
        self._announced: tuple[int, set[int]] = (-1, set())

    def shuffle_shards(self, group: int) -> None:
        """Shuffle the windows of `group` shards at a time, see `ShardOrder`."""
        self._group = group

    def announce(self, prefetch: Callable[[Sequence[int], Sequence[int]], None]) -> None:
        """Call `prefetch` with the files that are read now, and those that are read next, whenever they change."""
        self._prefetch = prefetch

    def lookup_order(self, seed: int) -> Lookup | None:
        """Return the order of `shuffle_shards`; None: all windows are shuffled together."""
        if self._group is None:
            return None
        self._order = ShardOrder(self.windows, self._group, seed)
        return self._order

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.gather(torch.tensor([index]), 0)
        return inputs[0], targets[0]

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two `(batch, sequence_length)` int64 tensors, inputs and targets, for the `(batch,)` sample ids."""
        ids = indices.numpy().astype(numpy.int64)
        if len(self.files) == 1:
            self._announce(epoch, [0])
            window = self._windows(0, ids).astype(numpy.int64)
        else:
            window = numpy.empty((len(ids), self.sequence_length + 1), numpy.int64)
            owners = numpy.searchsorted(self._ends, ids, side="right")
            files = numpy.unique(owners).tolist()
            self._announce(epoch, files)
            for owner in files:
                mine = owners == owner
                window[mine] = self._windows(owner, ids[mine] - self._begins[owner])
        if self.vocab_size is not None and window.max() >= self.vocab_size:  # an embedding would fail on the device
            problem = f"a shard holds the token {window.max()}, but the vocabulary has {self.vocab_size} ids"
            raise UserError(problem, "write the shards again")
        tokens = torch.from_numpy(window)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.document_end is not None:  # out of place: inputs and targets of a single row share their memory
            targets = targets.masked_fill(inputs == self.document_end, IGNORED)
        return inputs, targets

    def _windows(self, file: int, ids: numpy.ndarray) -> numpy.ndarray:
        return self.files[file][(ids * self.sequence_length)[:, None] + self._offsets]

    def _announce(self, epoch: int, files: list[int]) -> None:
        if self._prefetch is None or (epoch == self._announced[0] and self._announced[1].issuperset(files)):
            return
        last = files[-1]
        if self._order is None:
            now, following = files, [last + 1] if last + 1 < len(self.files) else []
        else:
            now, following = self._order.needed(epoch, last)
            now = sorted({*now, *files})  # a batch may end one group and begin the next
        self._announced = epoch, set(now)
        self._prefetch(now, following)
