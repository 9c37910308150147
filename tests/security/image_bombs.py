"""Images whose headers promise more than the files hold, and files that are no images."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(kind: str, size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header promises any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(side: int) -> bytes:
    content = bytearray(encoded("JPEG"))
    begin = content.index(b"\xff\xc0") + 5
    content[begin : begin + 4] = struct.pack(">HH", side, side)
    return bytes(content)


def gif(side: int) -> bytes:
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", side, side)
    return bytes(content)


def bmp(side: int) -> bytes:
    content = bytearray(encoded("BMP"))
    content[18:26] = struct.pack("<ii", side, side)
    return bytes(content)


def webp(side: int) -> bytes:
    content = bytearray(encoded("WEBP", lossless=True, exif=b"Exif\0\0x"))
    begin = content.index(b"VP8X") + 12
    content[begin : begin + 6] = struct.pack("<I", side - 1)[:3] * 2
    return bytes(content)


def tiff(side: int) -> bytes:
    content = bytearray(encoded("TIFF"))
    (begin,) = struct.unpack("<I", content[4:8])
    for index in range(struct.unpack("<H", content[begin : begin + 2])[0]):
        entry = begin + 2 + 12 * index
        if struct.unpack("<H", content[entry : entry + 2])[0] in (256, 257):
            content[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(content)


def ico(side: int) -> bytes:
    """An icon that says 16 x 16, and holds a PNG of any size."""
    inner = png(side, side)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


BOMBS = {
    "png": png(100_000, 100_000),
    "png-4-gigabytes": png(60_000, 60_000),
    "jpeg": jpeg(65_000),
    "gif": gif(65_000),
    "bmp": bmp(60_000),
    "webp": webp(16_383),
    "tiff": tiff(100_000),
    "ico": ico(60_000),
    "ppm": b"P6 100000 100000 255\n",
    "twice-as-large-as-pillow-warns-of": png(10_000, 10_000),
    "one-column-that-is-scaled-up": png(1, 60_000, b"\0\1" * 60_000),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "no-image": b"text",
    "empty": b"",
    "broken-checksum": png(8, 8)[:40] + b"\0\0\0\0" + png(8, 8)[44:],
}
