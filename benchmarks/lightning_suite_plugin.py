"""A pytest plugin of `lightning_suite.py`: our loop in every Trainer, and what became of each test in a file."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from lightning.pytorch import Trainer

from trainer.train.loop import LeanTrainingEpochLoop, use_lean_loop

_OUT = os.environ["LIGHTNING_SUITE_OUT"]
_batches = 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of a plugin that Lightning's tests use, and that need not be here")
    if os.environ["LIGHTNING_SUITE_LOOP"] != "lean":
        return
    init, train = Trainer.__init__, LeanTrainingEpochLoop._train

    def with_our_loop(self: Trainer, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        use_lean_loop(self)

    def counted(self: LeanTrainingEpochLoop, *arguments: Any) -> Any:
        global _batches
        _batches += 1
        return train(self, *arguments)

    Trainer.__init__ = with_our_loop  # type: ignore[assignment]
    Trainer.__init__.__wrapped__ = init  # type: ignore[attr-defined]
    LeanTrainingEpochLoop._train = counted  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    item.stash[_BEFORE] = _batches
    return (yield)


_BEFORE = pytest.StashKey[int]()
_OUTCOME = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    before = item.stash.get(_OUTCOME, "passed")
    if before == "passed":
        item.stash[_OUTCOME] = before = report.outcome
    if report.when == "teardown":
        line = {"test": item.nodeid, "outcome": before, "lean": _batches - item.stash[_BEFORE]}
        with open(_OUT, "a") as stream:
            stream.write(json.dumps(line) + "\n")
    return report
