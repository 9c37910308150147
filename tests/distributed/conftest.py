"""The table of the matrix (strategy x ranks x precision), printed after the tests."""

from __future__ import annotations

import pytest

Row = tuple[str, int, str, float]
MATRIX = pytest.StashKey[list[Row]]()


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> list[Row]:
    """(strategy, ranks, precision, largest relative difference of the losses from one process) of each run."""
    return request.config.stash.setdefault(MATRIX, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(MATRIX, [])
    if not rows:
        return
    cells = {(strategy, ranks, precision): difference for strategy, ranks, precision, difference in rows}
    columns = sorted({(precision, ranks) for _, ranks, precision, _ in rows})
    strategies = list(dict.fromkeys(strategy for strategy, *_ in rows))
    terminalreporter.section("losses: largest relative difference from one process without sharding")
    header = [f"{precision} x{ranks}" for precision, ranks in columns]
    terminalreporter.write_line(" ".join([" " * 16, *(f"{name:>14}" for name in header)]))
    for strategy in strategies:
        found = [cells.get((strategy, ranks, precision)) for precision, ranks in columns]
        texts = ["" if one is None else "same bits" if one == 0 else f"{one:.1e}" for one in found]
        terminalreporter.write_line(" ".join([f"{strategy:<16}", *(f"{text:>14}" for text in texts)]))
