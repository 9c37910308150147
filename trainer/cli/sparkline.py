"""Draw a curve in one line of text."""

from __future__ import annotations

import os
import sys

from trainer.runs.sampled import Curve

UNICODE, ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_LEAST = 2


def sparkline(curve: Curve, width: int, levels: str | None = None) -> str:
    """Return `width` characters: the mean value in each part of the steps, a blank where there is none.

    Args:
        curve: Steps and values, in any order. With fewer than two steps there is nothing to draw.
        width: Number of characters at most; a shorter curve has one per value.
        levels: Characters from low to high; None: those that the output can show.
    """
    steps = sorted({step for step, _ in curve})
    width = min(width, len(steps))
    if width < _LEAST:
        return ""
    levels = levels or (UNICODE if can_print(UNICODE) else ASCII)
    first, span = steps[0], steps[-1] - steps[0]
    parts: list[list[float]] = [[] for _ in range(width)]
    for step, value in curve:
        parts[min((step - first) * width // span, width - 1)].append(value)
    means = [sum(value / len(part) for value in part) if part else None for part in parts]
    known = [mean for mean in means if mean is not None]
    lowest, highest = min(known), max(known)
    return "".join(" " if mean is None else _level(mean, lowest, highest, levels) for mean in means)


def _level(value: float, lowest: float, highest: float, levels: str) -> str:
    if highest <= lowest:
        return levels[len(levels) // 2]
    share = (value / 2 - lowest / 2) / (highest / 2 - lowest / 2)  # the whole difference may be infinite
    return levels[min(int(share * len(levels)), len(levels) - 1)]


def can_print(text: str) -> bool:
    """Return whether stdout can encode a text, on a terminal that is not `dumb`."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return os.environ.get("TERM") != "dumb"
