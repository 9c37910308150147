"""Small modules, trained by plain Lightning and by us on one and two ranks, end with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.oracle.cases import CASES, Case

TOLERANCE = {1: 0.0, 2: 1e-5}
"""Largest difference of a weight, by the number of ranks: two ranks add gradients in another order than Lightning's,
because each has another half of the global batch."""
AT_ONCE = 48
"""Cases in one pair of processes: one that hangs takes down those after it."""

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """Number of ranks to case to what came out, for the tests that are run."""
    found: dict[int, Results] = {}
    for world, names in _wanted(request.session.items).items():
        found[world] = {}
        for start in range(0, len(names), AT_ONCE):
            folder = tmp_path_factory.mktemp(f"oracle-{world}")
            try:
                some = [str(folder), *names[start : start + AT_ONCE]]
                run_ranks(world, Path(__file__).with_name("rank.py"), some, folder, 600)
            except AssertionError as error:  # of one case, whose test says it
                found[world]["error"] = {"ours": str(error)[-3000:]}
            results = folder / "results.json"
            found[world] |= json.loads(results.read_text()) if results.exists() else {}
    return found


def _wanted(items: list[pytest.Item]) -> dict[int, list[str]]:
    """Number of ranks to the names of the cases."""
    wanted: dict[int, list[str]] = {world: [] for world in TOLERANCE}
    of_cases = [item for item in items if isinstance(item, pytest.Function) and "case" in item.fixturenames]
    for item in of_cases:
        if item.path == Path(__file__) and not item.get_closest_marker("skip"):
            wanted[item.callspec.params["world"]].append(item.callspec.params["case"].name)
    return wanted


def _params() -> list[Any]:
    found = []
    for case in CASES:
        for world in case.worlds:
            marks = [pytest.mark.slow] if world == 2 and not case.two_ranks else []
            found.append(pytest.param(case, world, id=f"{case.name}-{world}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "world"), _params())
def test_as_lightning(results: dict[int, Results], case: Case, world: int) -> None:
    """The same weights, steps and validation metrics; where weights may differ, the case says why."""
    found = results[world].get(case.name) or {"ours": f"not run: {results[world].get('error')}"}
    assert found.get("theirs") is None, f"Lightning itself: {found['theirs']}"
    assert found["ours"] is None
    assert found["only in one"] == []
    assert found["steps"][0] == found["steps"][1]
    assert found["logged"] == found["steps"][0]
    if world in case.differs:
        return
    assert found["apart"] <= TOLERANCE[world], found
    for name, (ours, theirs) in found["metrics"].items():
        assert ours == pytest.approx(theirs, abs=1e-5), name


def test_there_are_enough() -> None:
    """One for each hook, callback, loader, scheduler, logger and idiom; no two of the same name."""
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 60
