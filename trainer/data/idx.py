"""The IDX format of MNIST and related datasets: big-endian header, then one unsigned byte per value.

http://yann.lecun.com/exdb/mnist: two zero bytes, a type (8: unsigned byte), the number of dimensions, then the
dimensions as 32-bit integers.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy

from trainer.core.errors import UserError

_UNSIGNED_BYTE = 8


def read_idx(path: Path) -> numpy.ndarray:
    """Read the uint8 array in `path`, which may be gzipped; its shape is that of the header.

    Raises:
        UserError: The file is damaged or no IDX file of unsigned bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dimensions = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        if zero != 0 or kind != _UNSIGNED_BYTE:
            raise ValueError("not an IDX file of unsigned bytes")
        return numpy.frombuffer(raw, numpy.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (EOFError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read: {error}", "download the file again") from error
