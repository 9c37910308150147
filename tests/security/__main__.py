"""Run the attack tests alone and print a table: `python -m tests.security [arguments of pytest]`.

Each case of a test in this folder is one attack. It is blocked if the case passes; how is in the docstring of the test,
after "blocked by:", or else its first sentence.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

FOLDER = Path(__file__).parent
_MARK = "blocked by:"


@dataclass
class Attacks:
    """The cases of one test."""

    how: str
    blocked: int = 0
    open: list[str] = field(default_factory=list)
    skipped: int = 0

    @property
    def tried(self) -> int:
        return self.blocked + len(self.open)


class Table:
    """A pytest plugin that counts the cases of each test."""

    def __init__(self) -> None:
        self.tests: dict[str, Attacks] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in cast(list[Any], session.items):
            text = " ".join((item.function.__doc__ or "").split())
            how = text.partition(_MARK)[2].strip() if _MARK in text else text.partition(". ")[0].rstrip(".")
            self.tests.setdefault(_key(item.nodeid), Attacks(how))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        attacks = self.tests.get(_key(report.nodeid))
        if attacks is None:
            return
        if report.failed:
            attacks.open.append(report.nodeid)
        elif report.skipped:
            attacks.skipped += 1
        elif report.when == "call":
            attacks.blocked += 1

    def lines(self) -> list[str]:
        """Return the table, a line for each test, and the totals."""
        lines = [f"{'tried':>5} {'blocked':>7}  attack, and what blocks it"]
        file = ""
        for key, attacks in self.tests.items():
            path, _, name = key.partition("::")
            if path != file:
                file = path
                lines.append(f"{'':15}{file}")
            skipped = f" ({attacks.skipped} not tried here)" if attacks.skipped else ""
            what = name.removeprefix("test_").replace("_", " ")
            lines.append(
                f"{attacks.tried:5} {attacks.blocked:7}  {what}{skipped}{': ' if attacks.how else ''}{attacks.how}"
            )
            lines += [f"{'':15}OPEN {one}" for one in attacks.open]
        tried, blocked = (sum(getattr(one, name) for one in self.tests.values()) for name in ("tried", "blocked"))
        return [*lines, f"{tried:5} {blocked:7}  in all"]


def _key(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def main(arguments: list[str]) -> int:
    """Run the tests and print the table; return pytest's exit code. In one process: a plugin counts there."""
    table = Table()
    options = ["-q", "--no-header", "--no-summary", "-p", "no:xdist"]
    code = pytest.main([*options, str(FOLDER), *arguments], plugins=[table])
    print("\n".join(table.lines()))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
