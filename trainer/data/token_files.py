"""Files of plain integers, memory-mapped when they are read; few at a time, however many there are."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from trainer.core.errors import UserError
from trainer.data.untrusted import open_regular, shown

_MOST_MAPPED = 1024
"""Files that are mapped at once; each takes one of the file handles of the process."""
_SHARE_OF_HANDLES = 8


class TokenFiles:
    """Files of unsigned integers, as arrays.

    The ranks of a node share one copy in the page cache, which the system reclaims when it needs memory. Nothing is
    opened before it is read.

    Args:
        names: Names of the files, for `opened` and for messages.
        sizes: Their sizes in bytes.
        kind: Type of the integers.
        opened: Opens a file by its name.

    Raises:
        UserError: A file holds no whole number of integers.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        kind: type[numpy.unsignedinteger],
        opened: Callable[[str], BinaryIO],
    ) -> None:
        self.names, self.kind, self._opened = list(names), kind, opened
        width = numpy.dtype(kind).itemsize
        for name, size in zip(names, sizes, strict=True):
            if size % width:
                raise UserError(f"{shown(name)} holds {size:,} bytes, no multiple of {width}", "write the tokens again")
        self.lengths = numpy.array(sizes, dtype=numpy.int64) // width
        """Number of integers in each file."""
        handles = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(8, min(_MOST_MAPPED, handles // _SHARE_OF_HANDLES))
        self._mapped: OrderedDict[int, numpy.ndarray] = OrderedDict()

    @classmethod
    def local(cls, folder: Path, names: Sequence[str], kind: type[numpy.unsignedinteger]) -> TokenFiles:
        """Return files of a folder, whose sizes the file system tells."""
        sizes = [(folder / name).stat().st_size for name in names]
        return cls(names, sizes, kind, partial(open_in, folder))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is mapped: it would be copied."""
        return {**vars(self), "_mapped": OrderedDict()}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> numpy.ndarray:
        """Return the integers of a file, which must not be empty.

        Raises:
            UserError: The file cannot be read, or has another size by now.
        """
        tokens = self._mapped.get(number)
        if tokens is None:
            tokens = self._mapped[number] = self._map(number)
            if len(self._mapped) > self._most:
                self._mapped.popitem(last=False)
        elif len(self._mapped) > 1:
            self._mapped.move_to_end(number)
        return tokens

    def keep_only(self, numbers: Sequence[int]) -> None:
        """Close all other files."""
        for number in set(self._mapped) - set(numbers):
            del self._mapped[number]

    def _map(self, number: int) -> numpy.ndarray:
        """Map a file. The mapping has a file handle of its own, and with it the lock that `opened` may have taken."""
        name, expected = shown(self.names[number]), int(self.lengths[number]) * numpy.dtype(self.kind).itemsize
        try:
            with self._opened(self.names[number]) as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise ValueError(f"{size:,} bytes where {expected:,} were expected")
                # asarray: indexing a plain view costs half of indexing a memmap
                return numpy.asarray(numpy.memmap(file, self.kind, mode="r"))
        except ConnectionError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {error}", "write the tokens again") from None


def open_in(folder: Path, name: str) -> BinaryIO:
    """Open a regular file in a folder."""
    return open_regular(folder / name)
