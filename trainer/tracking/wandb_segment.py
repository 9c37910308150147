"""Read the number of the last row from a transaction log of W&B's client (`run-ID.wandb`).

The file has LevelDB's log format: blocks of 32 KiB, in them chunks with a header of 7 bytes (CRC, length, type). A
chunk is a whole record of W&B's protobuf, or its first, middle or last part. Only the end of the file is read.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
_FILE_HEADER_BYTES = 7
_FULL, _FIRST, _LAST = 1, 2, 4
_TAIL_BLOCKS = 32


def last_row(path: Path) -> int | None:
    """Return the number (`_step`) of the last whole row of the file, -1 if it has none; None: it cannot be read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            blocks = _TAIL_BLOCKS
            while True:
                start = max(0, (size - 1) // _BLOCK * _BLOCK - (blocks - 1) * _BLOCK)
                file.seek(start)
                numbers = [number for record in _records(file.read(), start) if (number := _number_of(record)) >= 0]
                if numbers:
                    return numbers[-1]
                if start == 0:
                    return -1
                blocks *= 8  # console output or system metrics fill the end
    except OSError:
        return None


def _records(data: bytes, start: int) -> Iterator[bytes]:
    """Yield the whole records in `data`, which begins at a block. A torn or damaged rest is left out."""
    position = _FILE_HEADER_BYTES if start == 0 else 0
    part: bytes | None = None
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        body = data[position + _HEADER.size : position + _HEADER.size + length]
        if len(body) < length or not _FULL <= kind <= _LAST or zlib.crc32(body, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += _HEADER.size + length
        if kind in (_FULL, _FIRST):
            part = body
        elif part is not None:  # else: its first part lies before `start`
            part += body
        if kind in (_FULL, _LAST) and part is not None:
            yield part
            part = None


def _number_of(record: bytes) -> int:
    """Return the `_step` of a row; -1 for any other record."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    try:
        parsed: Any = wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
    except DecodeError:
        return -1
    if parsed.WhichOneof("record_type") != "history":
        return -1
    for item in parsed.history.item:
        if (item.key or ".".join(item.nested_key)) == "_step":
            return int(json.loads(item.value_json))
    return int(parsed.history.step.num)
