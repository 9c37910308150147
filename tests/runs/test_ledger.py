"""Every second of a run is in one class."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from tests.hardware.powercap import Powercap
from tests.report.made import Page, points
from trainer.core.records import dumps
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import ledger
from trainer.runs.records import HeartbeatRecord

KILLER = """
import os
import signal

from lightning.pytorch import Callback


class KillTwice(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step >= {"0": 15, "1": 25}.get(os.environ["TORCHELASTIC_RESTART_COUNT"], 99):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def write_beat(run: RunDirectory, name: str, attempt: int, began: float, end: float, **fields: Any) -> None:
    beat = HeartbeatRecord(attempt=attempt, began=began, time=end, phase="train", **fields)
    (run.live_dir / name).write_text(dumps(beat))


def test_two_attempts_with_a_hang_add_up(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    run.live_dir.mkdir(parents=True)
    events = [
        {"time": 100.0, "event": "created"},
        {"time": 160.0, "event": "hang", "attempt": 0, "still_s": 12.0},
    ]
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    spent = {"import": 5.0, "build": 3.0, "train": 34.0, "data": 6.0, "save": 2.0}
    # Its clock was set an hour forwards on the way; the attempt has taken the 50 s of its phases.
    write_beat(run, "attempt-00-rank-0.json", 0, 110.0, 3760.0, spent=spent, first_step=0, step=20)
    spent = {"import": 5.0, "build": 3.0, "train": 20.0, "finished": 2.0}
    write_beat(run, "rank-0.json", 1, 164.0, 194.0, spent=spent, first_step=10, step=50)
    found = ledger(run)
    assert found is not None
    assert found["seconds"] == {
        "queue": 0,
        "start": 10.0,
        "import": 10.0,
        "build": 6.0,
        "first_step": 0,
        "train": 22.0 + 15.0,
        "data": 6.0,
        "redone": 5.0,  # 10 of the 40 steps of the second attempt
        "validate": 0,
        "save": 2.0,
        "finish": 2.0,
        "hang": 12.0,
        "down": 4.0,
    }
    assert sum(found["seconds"].values()) == found["wall_s"] == 94.0
    assert found["effective"] == pytest.approx(37 / 94, abs=1e-4)


def test_the_queue_ends_when_slurm_starts_the_job(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    run.live_dir.mkdir(parents=True)
    events = [
        {"time": 100.0, "event": "created"},
        {"time": 155.0, "event": "allocated", "attempt": 0, "since": 140},
        {"time": 285.0, "event": "allocated", "attempt": 1, "since": 280},
    ]
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    write_beat(run, "attempt-00-rank-0.json", 0, 160.0, 200.0, spent={"train": 40.0}, first_step=0, step=20)
    write_beat(run, "attempt-01-rank-0.json", 1, 290.0, 300.0, spent={"train": 10.0}, first_step=20, step=25)
    write_beat(run, "rank-0.json", 2, 304.0, 310.0, spent={"train": 6.0}, first_step=25, step=30)
    found = ledger(run)
    assert found is not None
    assert {name: value for name, value in found["seconds"].items() if value} == {
        "queue": 40.0 + 80.0,
        "start": 20.0,
        "down": 10.0 + 4.0,
        "train": 56.0,
    }
    assert found["goodput"] == pytest.approx(56 / 90, abs=1e-4)


def test_a_run_without_a_heartbeat_has_none(tmp_path: Path) -> None:
    assert ledger(RunDirectory(tmp_path / "job-abcdefgh")) is None


def test_the_classes_of_a_real_run_add_up_to_its_time_and_its_bill(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "killer.py").write_text(KILLER)
    sysfs = Powercap(workdir, {0: len(os.sched_getaffinity(0))})
    limits = [
        "trainer.max_steps=30",
        "trainer.log_every_n_steps=1",
        "checkpoint.every_n_steps=10",
        "trainer.max_epochs=null",
    ]
    killer = ["+callbacks.killer._target_=killer.KillTwice", "tracking=none", "resources.cpu_processes=2"]
    prices = ["cluster.price_per_cpu_core_hour=3600", "cluster.currency=EUR", "cluster.grid_gco2_per_kwh=360"]
    with sysfs.using(watts=100) as read_by:
        done = trainer_cli("fit", "experiment=quickstart", *limits, *killer, *prices, env=read_by)
        assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(trainer_cli("show", "--json").stdout)
    found = facts["ledger"]
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"], rel=0.01)
    assert all(found["seconds"][name] > 0 for name in ("start", "import", "build", "first_step", "train", "down"))
    assert 0 < found["effective"] < found["goodput"] + 1e-9 < 1
    page = trainer_cli("show").stdout
    assert "effective training" in page
    run, bill = RunDirectory(Path(facts["path"])), facts["bill"]
    first, *_ = records = run.usage()
    assert len(records) == 3
    held_s = sum(one.seconds for one in records)
    assert held_s == pytest.approx(found["wall_s"], abs=15)
    assert facts["cost"] == pytest.approx(held_s * first.devices, rel=1e-3)
    assert 0 < facts["energy_kwh"] * 3.6e6 < held_s * 100 * 1.5 + 100
    assert facts["bill"]["co2_kg"] == pytest.approx(facts["energy_kwh"] * 0.36, abs=1e-6)
    assert {"start", "train", "down"} <= set(bill["by_class"])
    for key in ("cpu_core_hours", "cost", "energy_kwh"):
        assert sum(charge[key] for charge in bill["by_class"].values()) == pytest.approx(bill[key], abs=1e-4)
    check_report(Page((run.path / "report.html").read_text()))  # written by the node process, after the last record
    assert " CPU core hours; " in page
    assert " EUR; " in page


def check_report(page: Page) -> None:
    """A run that was killed twice is one curve."""
    curve = points(page.figures["train/loss"][0])
    assert len(curve) == 30
    assert [x for x, _ in curve] == sorted({x for x, _ in curve})
    assert "quickstart" in page.text
    assert " finished " in page.text
    assert "2 interruptions survived." in page.text
    assert "was killed by SIGKILL" in page.text
    assert "Energy from the counters of the hardware: CPU" in page.text
    assert "Cost in EUR: 3600 per CPU core hour." in page.text
    assert "optimizer.lr 0.003 0.001" in page.text
    assert "Not in this report" not in page.text
