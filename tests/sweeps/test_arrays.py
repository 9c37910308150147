"""Which trials are submitted to SLURM, from what the queue shows."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.core import processes
from trainer.sweeps import arrays, decide
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import views
from trainer.sweeps.records import Array, ArrayJob, Owner, Parameter, Result, Spec

SPEC = Spec(
    revision=0,
    id="abcdefgh",
    name="s",
    command=[],
    fixed=[],
    parameters=[Parameter(key="x", kind="float", low=0.0, high=1.0)],
    method="random",
    trials=6,
    cwd="/",
    runs_dir="/runs",
    cluster="slurm",
)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    calls: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(arrays, "_submit_array", lambda sweep, spec, first, indices: calls.append((first, indices)))
    monkeypatch.setattr(arrays, "_most_index", lambda: 4)
    return calls


def make(folder: Path, spec: Spec, decided: int) -> SweepDirectory:
    sweep = SweepDirectory.new(folder / "sweeps", "s")
    sweep.write_spec(spec)
    sweep.add_trials(decide.planned(replace(spec, method="random"), 0, decided))
    return sweep


def owned(sweep: SweepDirectory, number: int, job: str) -> None:
    sweep.add_owner(
        number, Owner(number=0, host="h", boot_id="b", pid=1, pid_started=1, slurm_job_id=job, time=time.time())
    )


def array(age_s: float, **more: Any) -> Array:
    me = {"host": "h", "boot_id": processes.boot_id(), "pid": 1 << 22, "pid_started": 1}
    return Array(first=0, indices="0-5", comment="c", time=time.time() - age_s, **me, **more)


def submit(sweep: SweepDirectory, spec: Spec, states: dict[str, str], *, only_lost: bool = False) -> None:
    arrays._submit(sweep, spec, views(sweep, states), states, only_lost=only_lost)


def test_a_sweep_is_split_by_the_size_of_an_array(tmp_path: Path, submitted: list[Any]) -> None:
    submit(make(tmp_path, SPEC, 6), SPEC, {})
    assert submitted == [(0, [0, 1, 2, 3]), (4, [0, 1])]


def test_only_what_nobody_has_is_submitted_again(tmp_path: Path, submitted: list[Any]) -> None:
    sweep = make(tmp_path, SPEC, 6)
    sweep.add_array(0, array(1000))
    sweep.add_array_job(0, ArrayJob(slurm_job_id="70"))
    sweep.add_result(0, 0, Result(state="finished", time=0.0))
    owned(sweep, 1, "71")  # runs
    owned(sweep, 2, "72")  # its job is gone
    states = {"70_1": "RUNNING", "71": "RUNNING", "70_3": "PENDING", "70": "PENDING"}
    submit(sweep, SPEC, states)
    assert submitted == [(0, [2]), (4, [0, 1])]
    submitted.clear()
    submit(sweep, SPEC, states, only_lost=True)
    assert submitted == [(0, [2])]


def test_a_fresh_submission_is_not_repeated(tmp_path: Path, submitted: list[Any]) -> None:
    sweep = make(tmp_path, SPEC, 6)
    sweep.add_array(0, array(1))
    sweep.add_array_job(0, ArrayJob(slurm_job_id="70"))
    submit(sweep, SPEC, {})
    assert submitted == []


def test_a_generation_is_submitted_when_the_one_before_has_ended(tmp_path: Path, submitted: list[Any]) -> None:
    spec = replace(SPEC, method="tpe", generation=4)
    sweep = make(tmp_path, spec, 0)
    submit(sweep, spec, {})
    assert submitted == [(0, [0, 1, 2, 3])]
    submitted.clear()
    sweep = make(tmp_path / "later", spec, 4)
    for number in range(4):
        owned(sweep, number, str(number))
    submit(sweep, spec, {str(number): "RUNNING" for number in range(4)}, only_lost=True)
    assert submitted == []
    for number in range(4):
        sweep.add_result(number, 0, Result(state="finished", time=0.0))
    submit(sweep, spec, {}, only_lost=True)
    assert submitted == [(0, [0, 1])]
