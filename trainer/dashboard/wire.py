"""How curves are sent: a JSON header, then the numbers as 64-bit floats, which a page takes over without parsing."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.dashboard.curves import Curve

_COLUMNS = ("x", "y", "raw_x", "raw_y", "low", "high")


def packed(header: dict[str, Any], curves: Sequence[Curve]) -> bytes:
    """Return the length of the header (32 bits, little-endian), the header, and the columns of all curves.

    The header has the key `columns`: for each curve, name to first number and count. The numbers begin at a multiple of
    eight bytes.
    """
    arrays, places, position = [], [], 0
    for curve in curves:
        place: dict[str, list[int]] = {}
        for name in _COLUMNS:
            column = getattr(curve, name)
            if column is not None:
                place[name] = [position, len(column)]
                arrays.append(np.ascontiguousarray(column, dtype="<f8").tobytes())
                position += len(column)
        places.append(place)
    text = json.dumps({**header, "columns": places}, allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join([struct.pack("<I", len(text)), text, *arrays])
