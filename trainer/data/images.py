"""Open image files of unknown origin with Pillow. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.untrusted import open_regular

MAX_PIXELS = 89_478_485
"""Pillow's own limit: 256 MiB as 3 bytes a pixel."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO")
"""Formats that are read. Pillow finds the format in the content, and for EPS it would start Ghostscript."""
_PIXEL_BYTES = 8
"""Bytes of a pixel in the largest kind of file: four channels of 16 bits."""
_HEADER_BYTES = 2**20


def size_and_mode(path: Path) -> tuple[tuple[int, int], str]:
    """Return width and height in pixels, and Pillow's mode, from the header. Raises as `decode` does."""
    with open_regular(path) as file:
        image = _open(file, MAX_PIXELS)
        return image.size, image.mode


def decode(source: Path | BinaryIO, mode: str, side: int, max_pixels: int) -> Any:
    """Return the image in a file, which is decoded smaller where that is faster.

    Args:
        source: A path or a binary file object.
        mode: Pillow's mode: `L` or `RGB`.
        side: Pixels that each side keeps at least, if it has them.
        max_pixels: Maximum pixels of the image in the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, no image, or too large.
    """
    if isinstance(source, Path):
        with open_regular(source) as file:
            return decode(file, mode, side, max_pixels)
    image = _open(source, max_pixels)
    try:
        # libjpeg decodes at the smallest scale of 1/1, 1/2, 1/4, 1/8 that is large enough: four times as fast.
        image.draft(mode, (side, side))
        converted = image.convert(mode)
    except OSError:
        raise
    except Exception as error:  # SyntaxError, struct.error, IndexError, zlib.error ...: as the decoder has it
        raise ValueError(f"damaged image: {type(error).__name__}: {error}") from error
    _require_pixels(converted.size, max_pixels)  # the image inside an icon may be larger than the icon says
    return converted


def _open(file: BinaryIO, max_pixels: int) -> Any:
    from PIL import Image

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > max_pixels * _PIXEL_BYTES + _HEADER_BYTES:  # some decoders read the whole file first
        raise ValueError(f"{size:,} bytes are too many for an image of at most {max_pixels:,} pixels")
    if "JPEG2000" not in Image.OPEN:
        Image.init()
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for what it finds while it decodes
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"damaged image: {type(error).__name__}: {error}") from error
    _require_pixels(image.size, max_pixels)
    return image


def _require_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ValueError(f"{size[0]} x {size[1]} pixels, more than data.max_pixels={max_pixels}")
