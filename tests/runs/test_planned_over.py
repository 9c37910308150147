"""When what grows with a run is compared with its plan: once the planned steps are done, logged or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dashboard.fake_runs import make_run
from trainer.runs.bill import Charge
from trainer.runs.planned import plan_beside_run
from trainer.runs.records import PlannedRun

PLAN = PlannedRun(engine="formula", steps=1000, train_s=10.0, step_s=float("inf"), cost=0.0, currency="EUR")
LEDGER = {"seconds": {"train": 12.0, "redone": 3.0, "validate": 99.0}}


@pytest.mark.parametrize(
    ("steps", "cells"),
    [(1000, ["training", "10 s", "15 s", "+50%"]), (999, ["training", "10 s", "15 s so far", ""])],
)
def test_the_last_steps_need_not_be_logged(tmp_path: Path, steps: int, cells: list[str]) -> None:
    run = make_run(tmp_path, steps=steps, every=30)  # the last line is of step 990
    run.write_plan(PLAN)
    figures = plan_beside_run(run, run.config(), Charge(cost=1.5), LEDGER)
    assert [one.name for one in figures] == ["training", "cost"]  # without the step, which has no number
    assert figures[0].cells() == cells
    assert figures[1].difference is None  # of what was planned for nothing
