"""Times, numbers and values in words."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from trainer.core.units import duration
from trainer.report.defaults import UNKNOWN


def moment(seconds_since_1970: float | None) -> str | None:
    """Return a date and time in UTC: `2026-11-29 21:40 UTC`."""
    if seconds_since_1970 is None or not 0 <= seconds_since_1970 < 4e9:
        return None
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds_since_1970))


def span(seconds: float | None) -> str:
    """Return a duration in its two largest units: `3 h 12 min`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "not known"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    large, unit, small, small_unit = duration(seconds).split()
    return f"{large} {unit}" if small == "0" else f"{large} {unit} {small} {small_unit}"


def number(value: Any) -> str:
    """Return a metric with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "not known" if share is None else f"{share:.1%}" if share < 0.9995 else f"{share:.0%}"


def value(content: Any) -> str:
    """Return a value of a configuration as it is written on the command line."""
    if content is UNKNOWN:
        return "-"
    if content is None or isinstance(content, (bool, list, dict)):
        return json.dumps(content, default=str)
    return str(content)


def plural(count: int, name: str) -> str:
    """Return `1 rank`, `2 ranks`."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"
