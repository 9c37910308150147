"""Quantities as text: bytes of memory, seconds."""

from __future__ import annotations


def gib(num_bytes: int) -> str:
    """Format bytes as `12.34 GiB`, small ones in MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"


def seconds(value: float) -> str:
    """Format seconds with three significant digits, and whole ones from 1000 on."""
    return f"{three_digits(value)} s" if value >= 0.1 else f"{value * 1000:.3g} ms"


def three_digits(value: float) -> str:
    """Format a number of at least 0 with three significant digits, without an exponent from 1000 on."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def duration(value: float) -> str:
    """Format seconds as `3 d 4 h`, `2 h 5 min`, `40 s`, and less than one as `seconds` does."""
    if 0 < value < 1:
        return seconds(value)
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
