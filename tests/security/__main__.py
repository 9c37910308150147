"""Run the attack tests alone and print a table: `python -m tests.security [arguments of pytest]`.

Each case of a test in this folder, and of the tests in `ELSEWHERE`, is one attack, or as many as it records under the
property `attacks`. It is blocked if the case passes; by what is in the docstring of the test, after "blocked by:". A
case that is marked `honest` is none: a use that no defence may stop, which is counted apart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

FOLDER = Path(__file__).parent
ELSEWHERE = (
    "supervise/test_rendezvous.py::test_a_job_on_one_node_listens_on_loopback_only_and_survives_another_user",
    "supervise/test_rendezvous.py::test_nodes_are_numbered_by_the_launcher_and_serve_on_one_address",
    "supervise/test_rendezvous.py::test_the_first_node_fails_where_it_is_not_the_server",
    "dashboard/test_server.py::test_it_listens_on_the_loopback_interface_only",
    "dashboard/test_server.py::test_nobody_is_answered_without_the_cookie",
    "dashboard/test_server.py::test_other_hosts_are_refused",
    "dashboard/test_server.py::test_requests_of_other_pages_change_nothing",
    "dashboard/test_server.py::test_other_methods_are_refused",
    "dashboard/test_server.py::test_no_request_names_a_path",
    "dashboard/test_server.py::test_a_request_that_makes_no_sense_is_refused",
    "notify/test_channels.py::test_text_of_a_run_changes_neither_a_terminal_nor_a_header",
    "notify/test_verb.py::test_a_run_of_somebody_else_is_not_read_for_commands",
    "checkpoint/test_remote.py::test_a_damaged_object_and_a_foreign_commit_are_refused",
)
"""Attacks that need what the tests of their room have."""
_MARK = "blocked by:"


@dataclass
class Attacks:
    """The cases of one test."""

    how: str
    is_honest: bool = False
    blocked: int = 0
    open: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason to the number of cases that were not tried."""
    _outcomes: dict[str, str] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return self.blocked + len(self.open)

    def add(self, report: pytest.TestReport) -> None:
        """Count a case when all of its phases are over."""
        if report.failed:
            self._outcomes[report.nodeid] = "open"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._outcomes[report.nodeid] = reason.removeprefix("Skipped: ")
        if report.when != "teardown":
            return
        outcome = self._outcomes.get(report.nodeid, "blocked")
        if outcome == "blocked":
            self.blocked += int(cast(Any, dict(report.user_properties).get("attacks", 1)))
        elif outcome == "open":
            self.open.append(report.nodeid)
        else:
            self.skipped[outcome] = self.skipped.get(outcome, 0) + 1


class Table:
    """A pytest plugin that counts the cases of each test."""

    def __init__(self) -> None:
        self.tests: dict[str, Attacks] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in cast(list[Any], session.items):
            text = " ".join((item.function.__doc__ or "").split())
            is_honest = item.get_closest_marker("honest") is not None
            if is_honest == (_MARK in text):
                raise pytest.UsageError(f"{item.nodeid}: an attack says what it is blocked by, an honest use does not")
            how = text.partition(_MARK)[2].strip()
            self.tests.setdefault(_key(item.nodeid), Attacks(how, is_honest))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        attacks = self.tests.get(_key(report.nodeid))
        if attacks is not None:
            attacks.add(report)

    def lines(self) -> list[str]:
        """Return the table, a line for each test, and the totals."""
        lines = [f"{'tried':>6} {'blocked':>7}  attack: what blocks it"]
        file = ""
        for key, attacks in self.tests.items():
            path, _, name = key.partition("::")
            if path != file:
                file = path
                lines.append(f"{'':16}{file}")
            what = name.removeprefix("test_").replace("_", " ")
            if attacks.is_honest:
                if attacks.open:
                    lines += [f"{'':16}REFUSED, an honest use: {one}" for one in attacks.open]
                continue
            lines.append(f"{attacks.tried:6} {attacks.blocked:7}  {what}: {attacks.how}")
            lines += [f"{'':16}OPEN {one}" for one in attacks.open]
            lines += [f"{'':16}{count} not tried: {reason}" for reason, count in attacks.skipped.items()]
        tried, blocked, skipped = _sums([one for one in self.tests.values() if not one.is_honest])
        lines.append(f"{tried:6} {blocked:7}  in all" + (f"; {skipped} not tried here" if skipped else ""))
        uses, work, skipped = _sums([one for one in self.tests.values() if one.is_honest])
        left = f"; {skipped} not tried here" if skipped else ""
        return [*lines, f"{work} of {uses} honest uses work{left}"]


def _sums(tests: list[Attacks]) -> tuple[int, int, int]:
    """Return how many cases were tried, passed and skipped."""
    return (
        sum(one.tried for one in tests),
        sum(one.blocked for one in tests),
        sum(count for one in tests for count in one.skipped.values()),
    )


def _key(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def main(arguments: list[str]) -> int:
    """Run the tests and print the table; return pytest's exit code. In one process: a plugin counts there."""
    table = Table()
    options = ["-q", "--no-header", "--no-summary", "-p", "no:xdist"]
    code = pytest.main([*options, str(FOLDER), *(str(FOLDER.parent / one) for one in ELSEWHERE), *arguments], [table])
    print("\n".join(table.lines()))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
