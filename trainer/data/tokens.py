"""Windows of tokens, read from memory-mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch.utils.data import Dataset

from trainer.core.errors import UserError
from trainer.data.untrusted import open_regular, shown

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

    The files are memory-mapped: the ranks of a node share one copy in the page cache, which the system reclaims when it
    needs memory. Supports `gather`, see `seeded.SupportsGather`.

    Args:
        paths: Files of unsigned integers.
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
        paths: Sequence[Path],
        sequence_length: int,
        kind: type[numpy.unsignedinteger],
        document_end: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        # asarray: indexing a plain view costs half of indexing a memmap. An empty file cannot be mapped.
        self.files = [numpy.asarray(_mapped(path, kind)) for path in paths if path.stat().st_size]
        can_exceed = vocab_size is not None and vocab_size <= numpy.iinfo(kind).max
        self.vocab_size = vocab_size if can_exceed else None
        windows = [max(0, len(file) - 1) // sequence_length for file in self.files]
        if not sum(windows):
            tokens, names = sum(len(file) for file in self.files), ", ".join(path.name for path in paths[:3])
            raise UserError(
                f"{names or 'the data'}: {tokens} tokens, fewer than data.sequence_length={sequence_length} + 1",
                "use a smaller data.sequence_length, or more text",
            )
        self.sequence_length, self.document_end = sequence_length, document_end
        self._ends = numpy.cumsum(windows)
        self._begins = self._ends - windows
        self._offsets = numpy.arange(sequence_length + 1)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.gather(torch.tensor([index]), 0)
        return inputs[0], targets[0]

    def gather(self, indices: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two `(batch, sequence_length)` int64 tensors, inputs and targets, for the `(batch,)` sample ids."""
        ids = indices.numpy().astype(numpy.int64)
        if len(self.files) == 1:
            window = self._windows(0, ids).astype(numpy.int64)
        else:
            window = numpy.empty((len(ids), self.sequence_length + 1), numpy.int64)
            owners = numpy.searchsorted(self._ends, ids, side="right")
            for owner in numpy.unique(owners):
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


def _mapped(path: Path, kind: type[numpy.unsignedinteger]) -> numpy.ndarray:
    try:
        with open_regular(path) as file:
            return numpy.memmap(file, kind, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}", "write the tokens again") from None
