"""Render the progress bar of a terminal from a heartbeat (`live/rank-0.json`)."""

from __future__ import annotations

import math

from trainer.core.text import one_line
from trainer.runs.records import HeartbeatRecord

_SMALLEST_BAR = 6
_EFFICIENCY = {
    "train/mfu": "{:.0%} MFU",
    "gpu/peak_allocated_gb": "{:.0f} GB",
    "gpu/utilization": "GPU {:.0f}%",
    "gpu/power_w": "{:,.0f} W",
}
"""Metrics of GPUs that the bar has room for, and how they are written."""


def duration(seconds: float) -> str:
    """Format seconds as `1:05`, `1:02:03` or `2 d 03:04`; `?` if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def short(number: float) -> str:
    """Format a rate in at most five characters and a unit prefix: `912`, `4,520`, `45.2k`, `1.20M`."""
    # Each limit is where rounding would give the next unit's first number.
    for limit, divisor, suffix in ((9999.5, 1.0, ""), (999950, 1e3, "k"), (999.95e6, 1e6, "M"), (math.inf, 1e9, "G")):
        if number < limit:
            scaled = number / divisor
            digits = 0 if suffix == "" and scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:,.{digits}f}{suffix}"
    return str(number)


def render(beat: HeartbeatRecord, width: int) -> str:
    """Return a line of at most `width` characters; the least important parts are left out first."""
    step, most = beat.step, beat.max_steps
    head = [f"step {step}/{most}" if most else f"step {step}"]
    loss, rate, left_s = beat.metrics.get("train/loss"), beat.rate, beat.eta_s
    if beat.phase != "train":
        head.append(beat.phase.replace("_", " "))
    # Most important first, for a narrow terminal; the number is the position in the line.
    optional: list[tuple[int, str]] = []
    if loss is not None:
        optional.append((1, f"loss {loss:.4g}"))
    if left_s is not None:
        optional.append((8, f"{duration(left_s)} left"))
    if most:
        optional.append((0, f"{100 * min(step, most) // most}%"))
    if rate is not None:
        optional.append((2, f"{short(rate)} {beat.rate_unit or 'steps/s'}"))
    if beat.epoch is not None:
        optional.append((7, f"epoch {beat.epoch}"))
    for place, (name, form) in enumerate(_EFFICIENCY.items(), start=3):
        if name in beat.metrics:
            optional.append((place, form.format(beat.metrics[name])))
    line, separator = "", "  "
    for kept in range(len(optional), -1, -1):
        parts = [*head, *(text for _, text in sorted(optional[:kept]))]
        separator = next((gap for gap in ("  ", " ") if len(gap.join(parts)) <= width), " ")
        line = separator.join(parts)
        if len(line) <= width:
            break
    room = width - len(line) - 2
    if most and separator == "  " and room >= _SMALLEST_BAR:
        length = min(room, 30)
        done = length * min(step, most) // most
        line = "━" * done + "─" * (length - done) + "  " + line
    return one_line(line)[:width]
