"""What a trial has used so far counts towards the limits of its sweep, from the heartbeats of all its runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sweeps.test_arrays import SPEC, make, owned
from trainer.core.records import dumps
from trainer.runs.directory import RunDirectory
from trainer.runs.records import HeartbeatRecord
from trainer.sweeps import decide
from trainer.sweeps.analysis import table_of
from trainer.sweeps.progress import settle, views
from trainer.sweeps.records import Result, Retry, TrialRun


def trained(folder: Path, name: str, hours: float) -> RunDirectory:
    """Return a run of two GPUs that trains since so many hours."""
    run = RunDirectory(folder / "runs" / name)
    run.live_dir.mkdir(parents=True)
    run.config_path.write_text(json.dumps({"cluster": {"price_per_gpu_hour": 3.0}}))
    run.manifest_path.write_text("{}")
    run.events_path.write_text(json.dumps({"time": 0.0, "event": "created"}) + "\n")
    beat = HeartbeatRecord(time=hours * 3600, began=0.0, phase="train", spent={"train": hours * 3600}, step=1)
    (run.live_dir / "rank-0.json").write_text(dumps(beat))
    return run


def test_running_and_retried_trials_count(tmp_path: Path) -> None:
    spec = replace(SPEC, world_size=2, gpus=2, max_gpu_hours=7.0)
    sweep = make(tmp_path, spec, 4)
    owned(sweep, 0, "70")
    sweep.add_run(0, 0, TrialRun(path=str(trained(tmp_path, "s-running0", 1.0).path), first_attempt=0))
    failed = trained(tmp_path, "s-failed00", 0.5)
    owned(sweep, 1, "71")
    sweep.add_run(1, 0, TrialRun(path=str(failed.path), first_attempt=0))
    sweep.add_result(1, 0, Result(state="failed", run=str(failed.path), gpu_hours=1.0, time=0.0))
    sweep.add_retry(1, 1, Retry(first_owner=1, fresh=True, time=0.0))
    sweep.add_result(2, 0, Result(state="finished", gpu_hours=3.0, cost=9.0, time=0.0))
    found = settle(sweep, spec, views(sweep, {"70": "RUNNING"}))
    assert [view.gpu_hours for view in found] == pytest.approx([2.0, 1.0, 3.0, 0.0], abs=1e-3)
    assert [view.cost for view in found] == pytest.approx([6.0, 3.0, 9.0, 0.0], abs=1e-3)
    assert table_of(sweep, spec, found).rows[0].gpu_hours == pytest.approx(2.0, abs=1e-3)
    assert "beyond sweep.max_gpu_hours=7" in decide.next_step(spec, found, is_stopped=False).why_not
    assert decide.next_step(replace(spec, max_gpu_hours=10.1), found, is_stopped=False).claim == 1
    priced = replace(spec, max_gpu_hours=None, max_cost=18.0)
    assert decide.why_stopped(priced, found) == "its trials have used 18 of sweep.max_cost=18"
