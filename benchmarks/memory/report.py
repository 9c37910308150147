"""Table of two measurements of `step.py`: `python benchmarks/memory/report.py before.json after.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Found = dict[str, dict[str, dict[str, float]]]


def table(before: Found, after: Found) -> str:
    """Return the peak of a step in GiB, before and after, and what it consists of after, in Markdown."""
    lines = [
        "| Model, batch of a rank | Strategy | Peak before | Peak after | Weights and states | Passes | Update |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, strategies in after.items():
        for name, found in strategies.items():
            old = before.get(title, {}).get(name)
            cells = [_peak(old) if old else "-", _peak(found), *(f"{found[key]:.1f}" for key in KEYS)]
            lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


KEYS = ("rest", "passes", "update")


def _peak(found: dict[str, Any]) -> str:
    return f"{max(found['passes'], found['update']):.1f}"


if __name__ == "__main__":
    print(table(*(json.loads(Path(name).read_text()) for name in sys.argv[1:3])))
