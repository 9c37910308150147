"""A time limit shorter than the training: the job requeues itself until the training has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import LIMITED_JOB, LIMITED_STEPS, curve, logged_steps, story, submit, wait_for_event, weights
from tests.tracking.wandb_server import WandbServer
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, Notified

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_training_longer_than_its_time_limit_ends_as_if_it_had_had_the_time(
    limited: RunDirectory, testbed: Testbed, cli: TrainerCli, workdir: Path
) -> None:
    wait_until(lambda: requeues(limited) >= 2, 450, lambda: story(limited) + testbed.queue())
    # On a busy machine the start alone may take the minute that the job has.
    job_id = str(limited.launch().slurm_job_id)

    def is_listed(states: str) -> bool:
        return job_id in testbed.slurm("squeue", "-t", states, "-ho", "%i").split()

    wait_until(lambda: not is_listed("COMPLETING"))  # it is just being requeued
    if is_listed("PENDING,RUNNING"):  # else it has ended by now
        testbed.slurm("scontrol", "update", f"JobId={job_id}", "TimeLimit=20")
    untouched = submit(cli, workdir, *LIMITED_JOB, "resources.cpu_processes=2")
    wait_for_event(limited, "finished", 400)

    # On a busy machine the ranks may not even have begun when SLURM asks them to save, or begin when it ends them.
    reasons = [end.reason for end in limited.attempts() if end.outcome == "requeue"]
    saved = {"saved: its time limit was near", "saved: its time limit was reached"}
    assert saved & set(reasons)
    assert set(reasons) <= saved | {"not saved: its time limit was reached"}
    assert requeues(limited) == len(reasons) >= 2
    assert len({one.slurm_job_id for one in limited.events_of(Allocated)}) == 1
    assert logged_steps(limited) == list(range(1, LIMITED_STEPS + 1))
    assert curve(limited) == curve(untouched)
    assert weights(limited, LIMITED_STEPS, workdir / "a") == weights(untouched, LIMITED_STEPS, workdir / "b")
    assert {path.name.rpartition("-")[2] for path in limited.wandb_dir.glob("**/offline-run-*")} == {limited.id}
    job_script = "report.html, which the job script writes after the training"
    wait_until(lambda: not is_listed("RUNNING,COMPLETING"), 60, lambda: job_script + testbed.queue())
    with WandbServer() as server:
        synced = cli("sync", str(limited.path), env=server.environment(), timeout=180)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert server.runs, synced.stdout + synced.stderr
        (served,) = server.runs.values()
    rows = [(row["trainer/global_step"], row["train/loss"]) for row in served.history if "train/loss" in row]
    assert [step for step, _ in rows] == list(range(1, LIMITED_STEPS + 1))
    assert [loss for _, loss in rows] == pytest.approx([line["train/loss"] for line in curve(limited)], rel=1e-6)
    check_notifications(limited, len(reasons))
    wait_until(lambda: last_step(limited) == LIMITED_STEPS)  # the relay of the node publishes the last heartbeat
    allocations = {one.attempt: one.since for one in limited.events_of(Allocated)}
    records = limited.usage()
    assert len({one.attempt for one in records}) >= 2
    assert all(one.began == allocations[one.attempt] for one in records)
    # The last reading may come between these two lines.
    held_s = sum(one.seconds * one.devices for one in records)
    assert bill(limited).total.cpu_core_hours == pytest.approx(held_s / 3600, rel=0.2)
    # Written by the job script, which knows that this was not another requeue.
    report = limited.path / "report.html"
    wait_until(report.exists, 60, lambda: story(limited))
    assert "survived." in report.read_text()


def last_step(run: RunDirectory) -> int | None:
    beat = run.heartbeat(0)
    return beat.step if beat else None


def check_notifications(run: RunDirectory, count: int) -> None:
    """Each requeue and the end were told once, in their order, by the job itself."""
    wait_until(lambda: any(event.about == "finished" for event in run.events_of(Notified)), 60, lambda: story(run))
    told = [json.loads(line) for line in (run.path.parents[1] / "told.jsonl").read_text().splitlines()]
    times = ["once", *(f"{number} times" for number in range(2, count + 1))]
    titles = [f"{run.path.name} was requeued {word}" for word in times]
    assert [one["title"] for one in told] == [*titles, f"{run.path.name} finished at step {LIMITED_STEPS}"]
    assert all("its time limit was" in one["reason"] for one in told[:-1])
    assert not any(event.failed for event in run.events_of(Notified))


def requeues(run: RunDirectory) -> int:
    return [one.event for one in run.events()].count("requeued")
