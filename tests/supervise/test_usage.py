"""What the node process records of the devices and the energy of its attempts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hardware.powercap import Powercap
from tests.supervise.test_node import environment, has_step, make_run, wait_until
from trainer.config.shape import LaunchShape
from trainer.hardware.energy import SYSFS_VARIABLE
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated
from trainer.runs.records import HeartbeatRecord
from trainer.supervise import usage
from trainer.supervise.usage import UsageRecorder

SHAPE = LaunchShape(nodes=2, processes_per_node=2, device="cpu")
NUM_CORES = len(os.sched_getaffinity(0))

pytestmark = pytest.mark.usefixtures("no_orphans")


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Powercap:
    monkeypatch.setattr(usage, "POLL_S", 0.01)
    monkeypatch.setattr(usage, "EVERY_S", 0.02)
    return Powercap(tmp_path, {0: NUM_CORES})


def recorder(run: RunDirectory, sysfs: Powercap, attempts: list[int], node: int = 0, **variables: str) -> UsageRecorder:
    environment = {SYSFS_VARIABLE: str(sysfs.root), **variables}
    return UsageRecorder(run, node, SHAPE, lambda: attempts[-1], environment)


def joules(run: RunDirectory, attempt: int = 0, node: int = 0) -> float:
    records = [one for one in run.usage() if (one.attempt, one.node) == (attempt, node)]
    return sum(sum(phases.values()) for one in records for phases in one.joules.values())


def beat(run: RunDirectory, attempt: int, rank: int = 0, **spent: float) -> None:
    run.write_heartbeat(rank, HeartbeatRecord(attempt=attempt, phase="train", spent=spent, began=1.0))


def test_attempts_in_one_launch_have_records_of_their_own(workdir: Path, sysfs: Powercap) -> None:
    run, attempts = make_run(workdir), [0]
    with recorder(run, sysfs, attempts):
        wait_until(run.usage)
        sysfs.set(100)
        wait_until(lambda: joules(run) == 100)
        attempts.append(1)
        wait_until(lambda: len(run.usage()) == 2)
        sysfs.set(120)
        wait_until(lambda: joules(run, 1) == 20)
        sysfs.set(150)  # read when the node process ends
    first, second = run.usage()
    assert (joules(run, 0), joules(run, 1)) == (100, 50)
    assert (first.device, first.devices, first.measured) == ("cpu", NUM_CORES, NUM_CORES)
    assert second.began == pytest.approx(first.began + first.seconds)
    assert bill(run, {}).total.energy_kwh == pytest.approx(150 / 3.6e6)


def test_energy_goes_to_the_phases_as_the_rank_has_spent_its_time(workdir: Path, sysfs: Powercap) -> None:
    run, attempts = make_run(workdir), [1]
    readings = recorder(run, sysfs, attempts)
    readings._begin()
    beat(run, 0, save=50.0)  # of the attempt before
    total = 0
    for spent in ({}, {"train": 1e6, "data": 3e6}, {"train": 2e6, "data": 6e6}, {"train": 2e6, "data": 6e6}):
        if spent:
            beat(run, 1, **spent)
        total += 100
        sysfs.set(total)
        readings._read()
    (record,) = run.usage()
    # The last reading has no news of the rank, whose phase is `train`.
    assert record.joules["cpu"] == pytest.approx({"start": 100.0, "train": 150.0, "data": 150.0}, abs=0.1)


def test_the_time_before_the_first_heartbeat_is_the_start(workdir: Path, sysfs: Powercap) -> None:
    run = make_run(workdir)
    readings = recorder(run, sysfs, [0])
    readings._begin()
    readings._since -= 4.0
    beat(run, 0, train=1.0)
    sysfs.set(100)
    readings._read()
    (record,) = run.usage()
    assert record.joules["cpu"] == pytest.approx({"start": 75.0, "train": 25.0}, abs=2)


def test_each_node_follows_its_own_first_rank(workdir: Path, sysfs: Powercap) -> None:
    run = make_run(workdir)
    beat(run, 0, rank=0, validate=9.0)
    beat(run, 0, rank=2, save=9.0)
    with recorder(run, sysfs, [0], node=1, SLURM_JOB_NUM_NODES="4"):
        wait_until(run.usage)
    (record,) = run.usage()
    assert "save" in record.joules["cpu"]
    assert "validate" not in record.joules["cpu"]
    assert record.devices == NUM_CORES


def test_what_an_allocation_holds_before_and_beside_the_attempt_counts(workdir: Path, sysfs: Powercap) -> None:
    run = make_run(workdir)
    run.add_event(
        Allocated(event="allocated", attempt=0, since=wait_until(lambda: run.config_path.stat().st_mtime) - 60)
    )
    with recorder(run, sysfs, [0], SLURM_JOB_NUM_NODES="3"):
        wait_until(run.usage)
    run.add_event(Allocated(event="restarted", attempt=1))
    with recorder(run, sysfs, [1], SLURM_JOB_NUM_NODES="3"):
        wait_until(lambda: len(run.usage()) == 2)
    first, second = run.usage()
    assert first.devices == 2 * NUM_CORES  # with the spare node
    assert 60 <= first.seconds < 120
    assert second.began == pytest.approx(first.began + first.seconds, abs=0.01)


def test_a_failure_to_record_is_reported_once_and_ends_nothing(
    workdir: Path, sysfs: Powercap, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, attempts, tried = make_run(workdir), [0], []

    def refuse(self: RunDirectory, record: Any) -> None:
        tried.append(record)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, recorder(run, sysfs, attempts):
        patch.setattr(RunDirectory, "write_usage", refuse)
        wait_until(lambda: len(tried) > 2)
    assert capfd.readouterr().out.count("No space left on device") == 1


def test_a_driver_that_raises_is_a_reason_not_to_measure(
    workdir: Path, sysfs: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a driver")

    monkeypatch.setattr(usage, "counters_of", fail)
    run = make_run(workdir)
    with recorder(run, sysfs, [0]):
        wait_until(run.usage)
    (record,) = run.usage()
    assert (record.measured, record.missing) == (0, {"cpu": "RuntimeError: a driver"})


def test_a_killed_node_process_loses_at_most_one_interval_and_a_resume_adds_to_it(
    workdir: Path, sysfs: Powercap
) -> None:
    run = make_run(workdir)
    changes = "from trainer.supervise import node, usage; usage.POLL_S = usage.EVERY_S = 0.05"

    def start() -> subprocess.Popen[bytes]:
        program = f"import sys; {changes}; sys.exit(node.main(sys.argv[1:]))"
        variables = environment("train") | {SYSFS_VARIABLE: str(sysfs.root)}
        return subprocess.Popen([sys.executable, "-c", program, str(run.path)], env=variables, start_new_session=True)

    node = start()
    wait_until(lambda: has_step(run))
    sysfs.set(100)
    wait_until(lambda: joules(run) == 100)
    os.killpg(node.pid, signal.SIGKILL)
    node.wait(300)
    assert joules(run) == 100
    sysfs.set(1000)  # used while nothing ran
    node = start()
    wait_until(lambda: len(run.usage()) == 2)
    sysfs.set(1070)
    wait_until(lambda: joules(run, attempt=1) == 70)
    run.stop_request.touch()
    assert node.wait(300) == 0
    found = bill(run, {})
    assert found.total.energy_kwh == pytest.approx(170 / 3.6e6)
    assert found.total.cpu_core_hours == pytest.approx(sum(one.seconds for one in run.usage()) * NUM_CORES / 3600)
