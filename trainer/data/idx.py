"""The IDX format of MNIST and related datasets: big-endian header, then one unsigned byte per value.

http://yann.lecun.com/exdb/mnist: two zero bytes, a type (8: unsigned byte), the number of dimensions, then the
dimensions as 32-bit integers.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy

from trainer.core.errors import UserError
from trainer.data.untrusted import open_regular, read_exactly, require_within, shown, unpacked

_UNSIGNED_BYTE = 8


def read_idx(path: Path) -> numpy.ndarray:
    """Read the uint8 array in `path`, which may be gzipped; its shape is that of the header.

    Raises:
        UserError: The file is damaged or no IDX file of unsigned bytes.
    """
    try:
        with open_regular(path) as file:
            stream = unpacked(file) if path.suffix == ".gz" else file
            zero, kind, dimensions = struct.unpack(">HBB", read_exactly(stream, 4))
            if zero != 0 or kind != _UNSIGNED_BYTE:
                raise ValueError("not an IDX file of unsigned bytes")
            shape = struct.unpack(f">{dimensions}I", read_exactly(stream, 4 * dimensions))
            require_within(path, math.prod(shape), None)
            raw = read_exactly(stream, math.prod(shape))
            if stream.read(1):
                raise ValueError(f"more than the {len(raw):,} values of the header")
        return numpy.frombuffer(raw, numpy.uint8).reshape(shape).copy()
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}", "download the file again") from error
