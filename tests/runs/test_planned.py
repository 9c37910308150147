"""What the plan at the launch expected, beside what was measured: `trainer show`, the dashboard, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.dashboard.fake_runs import make_run
from trainer.cli import main
from trainer.core.errors import DONE
from trainer.dashboard.details import details_of
from trainer.report.page import report
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import ledger
from trainer.runs.planned import plan_beside_run
from trainer.runs.records import PlannedRun

PLAN = PlannedRun(
    engine="formula",
    device="NVIDIA A40",
    peak_bytes=2 * 2**30,
    step_s=0.01,
    samples_per_s=6400.0,
    steps=1000,
    train_s=10.0,
    cost=2.5,
    currency="EUR",
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """64 samples a step, 8,000 samples/s but for the first value, and 3 GiB of tensors at most."""
    run = make_run(tmp_path)
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {
            "train/samples_per_s": 8000.0 if number else 1.0,
            "gpu/peak_allocated_gb": 3 * 2**30 / 1e9 - 1 / line["step"],
        }
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_plan(PLAN)
    return run


def cells(run: RunDirectory) -> dict[str, list[str]]:
    found = plan_beside_run(run, run.config(), bill(run).total, ledger(run))
    return {one.name: one.cells()[1:] for one in found}


def test_each_planned_figure_has_what_was_measured(run: RunDirectory) -> None:
    assert cells(run) == {
        "memory, tensors": ["2.00 GiB", "3.00 GiB", "+50%"],
        "step": ["10 ms", "8 ms", "-20%"],
        "samples/s": ["6,400", "8,000", "+25%"],
        "training": ["10 s", "21 s", "+110%"],  # useful steps, and waiting for data
        "cost": ["2.50 EUR", "not measured", ""],
    }


def test_a_run_that_is_not_over_has_no_difference_in_what_still_grows(run: RunDirectory) -> None:
    run.write_plan(replace(PLAN, steps=5000, train_s=50.0))
    found = cells(run)
    assert found["step"][2] == "-20%"
    assert found["training"] == ["50 s", "21 s so far", ""]


def test_it_is_shown_everywhere(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run.path)]) == DONE
    sheet = capsys.readouterr().out
    assert "  plan         memory, tensors  2.00 GiB planned, 3.00 GiB measured (+50%)\n" in sheet
    assert "               cost             2.50 EUR planned, not measured\n" in sheet
    assert main(["show", str(run.path), "--json"]) == DONE
    figures = {one["name"]: (one["planned"], one["measured"]) for one in json.loads(capsys.readouterr().out)["plan"]}
    assert figures["step"] == (0.01, pytest.approx(0.008))
    assert ["step", "10 ms", "8 ms", "-20%"] in details_of(run, {})["plan"]
    assert "Plan and run" in report(run)
    assert "6,400" in report(run)
    run.plan_path.unlink()
    assert main(["show", str(run.path)]) == DONE
    assert "planned" not in capsys.readouterr().out
    assert "Plan and run" not in report(run)
