"""A time limit shorter than the training: the job requeues itself until the training has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import curve, logged_steps, on_slurm, paced, story, submit, wait_for_event, weights
from tests.tracking.wandb_server import WandbServer
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, Notified

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 80
JOB = [f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=1000", "trainer.log_every_n_steps=1"]
"""Saves only when it is asked to."""
SAVED = {"saved: its time limit was near", "saved: its time limit was reached"}


def test_a_training_longer_than_its_time_limit_ends_as_if_it_had_had_the_time(
    testbed: Testbed, cli: TrainerCli, workdir: Path
) -> None:
    limited = submit_limited(testbed, cli, workdir / "limited")
    job_id = str(limited.launch().slurm_job_id)
    untouched = submit(cli, workdir, *JOB, "resources.cpu_processes=2")
    wait_until(lambda: SAVED & set(requeued(limited)), 450, lambda: story(limited) + testbed.queue())

    def is_listed(states: str) -> bool:
        return job_id in testbed.slurm("squeue", "-t", states, "-ho", "%i").split()

    wait_until(lambda: not is_listed("COMPLETING"))  # it is just being requeued
    if is_listed("PENDING,RUNNING"):  # else it has ended by now
        testbed.slurm("scontrol", "update", f"JobId={job_id}", "TimeLimit=20")
    wait_for_event(limited, "finished", 400)

    # On a busy machine the ranks may not even have begun when SLURM asks them to save, or begin when it ends them.
    reasons = requeued(limited)
    assert SAVED & set(reasons)
    assert set(reasons) <= SAVED | {"not saved: its time limit was reached"}
    assert [one.event for one in limited.events()].count("requeued") == len(reasons)
    assert len({one.slurm_job_id for one in limited.events_of(Allocated)}) == 1
    assert logged_steps(limited) == list(range(1, STEPS + 1))
    assert curve(limited) == curve(untouched)
    assert weights(limited, STEPS, workdir / "a") == weights(untouched, STEPS, workdir / "b")
    assert {path.name.rpartition("-")[2] for path in limited.wandb_dir.glob("**/offline-run-*")} == {limited.id}
    job_script = "report.html, which the job script writes after the training"
    wait_until(lambda: not is_listed("RUNNING,COMPLETING"), 60, lambda: job_script + testbed.queue())
    with WandbServer() as server:
        synced = cli("sync", str(limited.path), env=server.environment(), timeout=180)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert server.runs, synced.stdout + synced.stderr
        (served,) = server.runs.values()
    rows = [(row["trainer/global_step"], row["train/loss"]) for row in served.history if "train/loss" in row]
    assert [step for step, _ in rows] == list(range(1, STEPS + 1))
    assert [loss for _, loss in rows] == pytest.approx([line["train/loss"] for line in curve(limited)], rel=1e-6)
    check_notifications(limited, len(reasons))
    wait_until(lambda: last_step(limited) == STEPS)  # the relay of the node publishes the last heartbeat
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
    assert [one["title"] for one in told] == [*titles, f"{run.path.name} finished at step {STEPS}"]
    assert all("its time limit was" in one["reason"] for one in told[:-1])
    assert not any(event.failed for event in run.events_of(Notified))


def requeued(run: RunDirectory) -> list[str]:
    return [end.reason for end in run.attempts() if end.outcome == "requeue"]


def submit_limited(testbed: Testbed, cli: TrainerCli, folder: Path) -> RunDirectory:
    """A run that cannot get to the end within its time limit before it has been resumed."""
    options = ["tracking.name=wandb", "tracking.mode=offline", "cluster.time='00:01:30'"]
    options += ["cluster.save_before_end_s=30", *on_slurm(ranks=2, nodes=1), *paced(1.0, resumed=False)]
    # On a busy machine the start alone may take the minute that the job has: that must not end the run.
    options += ["cluster.attempts_without_progress=20"]
    options += ["notify=command", f"notify.command=[sh,-c,'cat >> {folder}/told.jsonl']", "notify.after_requeues=1"]
    run = submit(cli, folder, *JOB, *options)
    # What the command line refuses as too short for anyone's training: SLURM asks to save 0 to 30 s after the start.
    testbed.slurm("scontrol", "update", f"JobId={run.launch().slurm_job_id}", "TimeLimit=1")
    return run
