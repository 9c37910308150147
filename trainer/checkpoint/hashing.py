"""Checksums of files: computed while they are written, and by several threads when they are verified.

hashlib releases the interpreter lock for large buffers, so a thread hashes what another writes or reads, and the disk
writes what came before (`writeback.py`). This module does not import torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trainer.checkpoint import wellformed
from trainer.checkpoint.faults import fault_point
from trainer.checkpoint.writeback import PIECE_BYTES, Writeback

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

MOST_THREADS = 8
"""More threads of one process read a checkpoint no faster: the ranks of a node read at the same time."""
_CHUNK_BYTES = 4 << 20
_SMALL_BYTES = 1 << 20
"""Less is hashed by the thread that writes: handing it over costs as much."""


class HashingFile:
    """A writable file that is hashed while it is written, so that checksums need no second read.

    A thread hashes a large buffer while it is written, and every `PIECE_BYTES` are on their way to the disk at once.
    Closing ends the thread and leaves the file open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.error: Exception | None = None
        """First error of a write: torch.save replaces it by one that does not name the cause."""
        self._digest = hashlib.sha256()
        self._writeback = Writeback(file.fileno())
        self._exit = ExitStack()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self._exit.close()

    def write(self, data: Any) -> int:
        """Write all of `data`, and return its size in bytes."""
        view = memoryview(data).cast("B")
        try:
            if view.nbytes < _SMALL_BYTES:
                self._digest.update(view)
                self._write(view)
            else:
                self._write_and_hash(view)
        except Exception as error:
            self.error = self.error or error
            raise
        return view.nbytes

    def _write_and_hash(self, view: memoryview) -> None:
        if self._thread is None:
            from concurrent.futures import ThreadPoolExecutor  # not for commands that only list checkpoints

            self._thread = self._exit.enter_context(ThreadPoolExecutor(1, "checkpoint-hash"))
        hashed = self._thread.submit(self._digest.update, view)
        try:
            for begin in range(0, view.nbytes, PIECE_BYTES):
                self._write(view[begin : begin + PIECE_BYTES])
        finally:
            hashed.result()  # `view` may change once this returns

    def _write(self, view: memoryview) -> None:
        fault_point("file.write")
        self.file.write(view)
        self.bytes += view.nbytes
        self._writeback.start(self.bytes)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.bytes

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written as hexadecimal digits."""
        return self._digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(os.open(path, wellformed.READ), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def checksums(paths: Iterable[Path]) -> Iterator[str | OSError]:
    """Yield the SHA-256 of each file, or the error that reading it gave, in order.

    Several threads read; each holds a few megabytes.
    """

    def hashed(path: Path) -> str | OSError:
        try:
            return sha256(path)
        except OSError as error:
            return error

    given = list(paths)
    if len(given) < 2:
        yield from map(hashed, given)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads(), "checkpoint-verify") as pool:
        yield from pool.map(hashed, given)


def threads(ranks_on_node: int = 1) -> int:
    """Return how many threads of one process read a checkpoint."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_THREADS, cores // max(1, ranks_on_node)))
