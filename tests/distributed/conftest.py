"""The table of the matrix (strategy x ranks x precision), printed after the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

Row = tuple[str, int, str, float]


@pytest.fixture(scope="module")
def matrix(tables: dict[str, list[str]]) -> Iterator[list[Row]]:
    """(strategy, ranks, precision, largest relative difference of the losses from one process) of each run."""
    rows: list[Row] = []
    yield rows
    if rows:
        tables["losses: largest relative difference from one process without sharding"] = formatted(rows)


def formatted(rows: list[Row]) -> list[str]:
    cells = {(strategy, ranks, precision): difference for strategy, ranks, precision, difference in rows}
    columns = sorted({(precision, ranks) for _, ranks, precision, _ in rows})
    lines = [" ".join([" " * 16, *(f"{f'{precision} x{ranks}':>14}" for precision, ranks in columns)])]
    for strategy in dict.fromkeys(strategy for strategy, *_ in rows):
        found = [cells.get((strategy, ranks, precision)) for precision, ranks in columns]
        texts = ["" if one is None else "same bits" if one == 0 else f"{one:.1e}" for one in found]
        lines.append(" ".join([f"{strategy:<16}", *(f"{text:>14}" for text in texts)]))
    return lines
