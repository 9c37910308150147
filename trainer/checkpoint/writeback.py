"""Send what was written to a file to the disk at once, so that the fsync at its end has little left to wait for.

Linux keeps written pages in memory for up to 30 s, or until they are a tenth of it: the disk would be idle while a file
is written and hashed. This is a hint. Whether the data is on the disk, and what was wrong with it, is what fsync
reports. This module does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

PIECE_BYTES = 16 << 20
"""Bytes that are sent at a time."""
_SYNC_FILE_RANGE_WRITE = 2


class Writeback:
    """The writing to the disk of one file, which grows at its end.

    Where the system or the filesystem has no such call, nothing is done, and fsync does all of it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._started = 0
        """How many bytes were sent, from the beginning of the file."""
        self._send = _sync_file_range()

    def start(self, written: int) -> None:
        """Send the whole pieces of the first `written` bytes that were not sent yet; does not wait for the disk."""
        whole = written - written % PIECE_BYTES
        if self._send is None or whole == self._started:
            return
        size = whole - self._started
        if self._send(self._descriptor, self._started, size, _SYNC_FILE_RANGE_WRITE) != 0:
            self._send = None
        self._started = whole


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return sync_file_range(2), which keeps the pages in memory; posix_fadvise would drop them. None: not on Linux."""
    import ctypes  # not for commands that only list checkpoints

    try:
        function: Any = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    send: Callable[[int, int, int, int], int] = function
    return send
