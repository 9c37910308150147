"""Read and rewind `metrics.jsonl`, which `tracking/metrics_file.py` writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.files import parse_json, read_bytes, write_atomic

OWN_NAMES = ("step", "epoch", "time")
"""Names in a line that are no metrics."""
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""How a line has the numbers that JSON does not have."""
MOST_METRICS = 2000
"""Readers ignore further metrics of a run: a name that holds a step number would make a metric of each line."""
_MOST_BYTES = 4 * 1024**3
RECENT_S = 5.0
"""Longer than the client of W&B buffers a row (tracking/weights_and_biases.py sets 1 s)."""


@dataclass(frozen=True)
class Rewound:
    """The result of `rewind`."""

    dropped: int
    """Number of lines removed."""
    recent: list[dict[str, Any]]
    """Kept lines that were written within `RECENT_S` before the last one.

    A process that was killed at that time may not have sent them to another tracker.
    """


def rewind(path: Path, step: int) -> Rewound:
    """Remove the lines of steps after `step`, and a last line that was cut short by a crash."""
    if not path.exists():
        return Rewound(0, [])
    text = read_bytes(path, _MOST_BYTES).decode(errors="replace")
    lines = text.removesuffix("\n").split("\n") if text else []
    read = [(line, parsed) for line in lines if (parsed := _parsed(line)) is not None]
    last = max((parsed["time"] for _, parsed in read), default=0.0)
    kept = [(line, parsed) for line, parsed in read if parsed["step"] <= step]
    if len(kept) != len(lines) or not text.endswith("\n"):  # the next line would be appended to the last one
        write_atomic(path, "".join(f"{line}\n" for line, _ in kept))
    return Rewound(len(lines) - len(kept), [parsed for _, parsed in kept if last - parsed["time"] <= RECENT_S])


def lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of steps after `step`, oldest first. One that cannot be used is left out."""
    if not path.exists():
        return []
    lines = read_bytes(path, _MOST_BYTES).decode(errors="replace").split("\n")
    return [parsed for line in lines if (parsed := _parsed(line)) is not None and parsed["step"] > step]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = parse_json(line)
        return {**parsed, "step": int(parsed["step"]), "time": float(parsed["time"])}
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
