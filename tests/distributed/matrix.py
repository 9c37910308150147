"""The table of strategy x ranks x precision."""

from __future__ import annotations

Row = tuple[str, int, str, float]
"""Strategy, ranks, precision, largest relative difference of the losses from one process."""
TITLE = "losses: largest relative difference from one process without sharding"


def lines(rows: list[Row]) -> list[str]:
    cells = {(strategy, ranks, precision): difference for strategy, ranks, precision, difference in rows}
    columns = sorted({(precision, ranks) for _, ranks, precision, _ in rows})
    header = [f"{precision} x{ranks}" for precision, ranks in columns]
    found = [" ".join([" " * 16, *(f"{name:>14}" for name in header)])]
    for strategy in dict.fromkeys(strategy for strategy, *_ in rows):
        numbers = [cells.get((strategy, ranks, precision)) for precision, ranks in columns]
        texts = ["" if one is None else "same bits" if one == 0 else f"{one:.1e}" for one in numbers]
        found.append(" ".join([f"{strategy:<16}", *(f"{text:>14}" for text in texts)]))
    return found
