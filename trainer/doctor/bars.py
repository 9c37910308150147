"""A bar chart as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _BAR, _GAP, _TOP, _FOOT = 760, 20, 8, 56, 30
_CHARACTER, _PADDING, _VALUE = 6.6, 12, 130
"""Width of a character of the labels, space around them, and space for the text right of a bar; pixels."""
_COLORS = ("#3b6fb6", "#4f9d69", "#c98b3c", "#a05a9c", "#5b8f9e")


def bars(title: str, unit: str, values: Sequence[tuple[str, str, float, str]]) -> str:
    """Return the chart. The axis is logarithmic if the values differ by more than a factor of 30.

    Args:
        title: Above the bars.
        unit: Of the values, in the line below the title.
        values: Label, group (which has the color), value, and the text right of the bar.
    """
    left = _PADDING + _CHARACTER * max((len(label) for label, *_ in values), default=0)
    room = _WIDTH - left - _VALUE
    most = max((value for _, _, value, _ in values), default=1.0)
    least = min((value for _, _, value, _ in values if value > 0), default=most)
    is_log = most > 30 * least
    groups = list(dict.fromkeys(group for _, group, _, _ in values))
    height = _TOP + len(values) * (_BAR + _GAP) + _FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_PADDING}" y="22" font-size="15" font-weight="600" fill="#1c1c1c">{escape(title)}</text>',
        f'<text x="{_PADDING}" y="42" fill="#5a5a5a">{escape(unit)}{", logarithmic" if is_log else ""}</text>',
    ]
    for number, (label, group, value, text) in enumerate(values):
        top = _TOP + number * (_BAR + _GAP)
        share = _share(value, least, most, is_log)
        color = _COLORS[groups.index(group) % len(_COLORS)]
        middle, width = top + _BAR * 0.7, max(1.0, share * room)
        lines += [
            f'<text x="{left - 6:.0f}" y="{middle:.0f}" text-anchor="end" fill="#1c1c1c">{escape(label)}</text>',
            f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{_BAR}" fill="{color}" rx="2"/>',
            f'<text x="{left + width + 6:.0f}" y="{middle:.0f}" fill="#1c1c1c">{escape(text)}</text>',
        ]
    lines.append(f'<line x1="{left:.0f}" y1="{_TOP - 6}" x2="{left:.0f}" y2="{height - _FOOT}" stroke="#9a9a9a"/>')
    return "\n".join([*lines, "</svg>", ""])


def _share(value: float, least: float, most: float, is_log: bool) -> float:
    """Return the length of a bar, 0 to 1. On a logarithmic axis the smallest value has a tenth."""
    if value <= 0 or most <= 0:
        return 0.0
    if not is_log:
        return value / most
    return 0.1 + 0.9 * math.log(value / least) / math.log(most / least)
