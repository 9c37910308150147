"""Which messages are due after which events, and that none is sent twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.notify.servers import HttpServer
from trainer.config.notify import NotifyOptions
from trainer.notify.deliver import deliver
from trainer.notify.due import Due, due
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, Launch
from trainer.runs.state import State
from trainer.runs.trouble import QUIET_S

RUNNING = State("running")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "runs" / "digits-abcd1234")
    directory.path.mkdir(parents=True)
    directory.write_launch(Launch(cluster="slurm", slurm_job_id="7"))
    directory.add_event(events.Created())
    return directory


def messages(run: RunDirectory, state: State = RUNNING, **options: Any) -> list[Due]:
    return due(run, {**vars(NotifyOptions()), **options}, state)


def titles(run: RunDirectory, state: State = RUNNING, **options: Any) -> list[str]:
    return [one.message.title.removeprefix("digits-abcd1234 ") for one in messages(run, state, **options)]


def tell(run: RunDirectory, at: float | None = None) -> None:
    """Record what is due as sent."""
    for one in messages(run):
        run.add_event(events.Notified(time=at or time.time(), about=one.message.event, key=one.key, channels=["slack"]))


def test_ends_are_told_once_and_say_what_to_type(run: RunDirectory) -> None:
    run.add_event(events.Tracking(url="https://wandb.example/run"))
    run.add_event(events.Ended(event="failed", attempt=0, step=12, reason="ValueError: no"))
    (one,) = messages(run)
    assert one.message.title == "digits-abcd1234 failed at step 12"
    assert (one.message.reason, one.message.state) == ("ValueError: no", "failed")
    assert one.message.next == f"trainer resume {run.path}"
    assert one.message.wandb == "https://wandb.example/run"
    tell(run)
    assert titles(run) == []
    run.add_event(events.Resumed())
    run.add_event(events.Ended(event="finished", attempt=1, step=40))
    assert titles(run) == ["finished at step 40"]
    assert titles(run, events=["failed"]) == []
    assert titles(run, events=[]) == []


def test_events_before_a_resume_are_no_news(run: RunDirectory) -> None:
    run.add_event(events.Ended(event="failed", attempt=0, step=12))
    run.add_event(events.Resumed(overrides=["notify=slack"]))
    assert titles(run) == []


def test_every_nth_requeue(run: RunDirectory) -> None:
    for number in range(1, 7):
        run.add_event(events.Ended(event="preempted", attempt=number, step=number, reason=f"saved: {number}"))
        run.add_event(events.Requeued(slurm_job_id="7"))
    reason = "saved: its time limit was near"
    run.write_outcome(AttemptOutcome(attempt=3, outcome="requeue", reason=reason, time=1.0))
    first, second = messages(run)
    assert [one.message.title for one in (first, second)] == [
        "digits-abcd1234 was requeued 3 times",
        "digits-abcd1234 was requeued 6 times",
    ]
    assert (first.message.reason, second.message.reason) == (reason, "saved: 6")
    assert titles(run, after_requeues=5) == ["was requeued 5 times"]
    assert len(titles(run, after_requeues=1)) == 6


def test_a_long_wait_in_the_queue(run: RunDirectory) -> None:
    queued = time.time() - 3700
    run.add_event(events.Queued(time=queued, slurm_job_id="7"))
    assert titles(run, RUNNING) == []
    (one,) = due(
        run, vars(NotifyOptions()), State("queued", "pending"), why_it_waits=lambda: ["2 jobs are ahead of it", "soon"]
    )
    assert one.message.title == "digits-abcd1234 is pending for 62 min"
    assert one.message.reason == "2 jobs are ahead of it; soon"
    assert one.message.next == f"trainer why {run.path}"
    run.add_event(events.Notified(about="pending", key=one.key, channels=["slack"]))
    assert titles(run, State("queued")) == []
    assert titles(run, State("queued"), pending_after_minutes=90.0) == []
    run.add_event(events.Requeued(slurm_job_id="7"))
    assert titles(run, State("requeued")) == []  # waits anew


def test_a_nan_at_every_step_is_one_message(run: RunDirectory) -> None:
    now = time.time()
    for step in range(50):
        run.add_event(events.BadStepEvent(event="not_finite", time=now - 50 + step, step=step, action="skipped"))
    assert titles(run) == ["loss or gradient not finite at step 49: skipped"]
    tell(run, at=now)
    run.add_event(events.BadStepEvent(event="not_finite", time=now + 1, step=60, action="skipped"))
    assert titles(run) == []
    (later,) = due(run, vars(NotifyOptions()), RUNNING, now=now + QUIET_S + 2)
    assert later.message.step == 60


def test_hangs_and_stragglers(run: RunDirectory) -> None:
    run.add_event(events.Hang(attempt=0, rank=1, step=7, still_s=30.0, reason="rank 1 on b made no progress"))
    run.add_event(events.Straggler(attempt=0, rank=2, host="c", reason="rank 2 on c takes 3 times as long"))
    assert titles(run) == ["hangs at step 7", "waits for rank 2 on c"]


def test_a_run_that_died_with_its_machine(run: RunDirectory) -> None:
    run.add_event(events.Started(time=time.time()))
    dead = State("dead", "its processes are gone")
    assert titles(run, dead) == []  # SLURM may be about to requeue it
    (one,) = due(run, vars(NotifyOptions()), dead, now=time.time() + 200)
    assert (one.message.event, one.message.reason) == ("failed", "its processes are gone")
    run.write_launch(Launch(cluster="local", pid=1))
    (one,) = messages(run, dead)
    run.add_event(events.Notified(about="failed", key=one.key, channels=["slack"]))
    assert titles(run, dead) == []


def test_a_run_of_an_older_release_has_no_channel(run: RunDirectory) -> None:
    (run.path / "config.yaml").write_text("name: x\n")
    run.add_event(events.Ended(event="failed", attempt=0))
    assert deliver(run, RUNNING) == []


PENDING = State("queued", "SLURM reports 7 PENDING")
KINDS: dict[str, tuple[list[events.Event], State]] = {
    "finished": ([events.Ended(event="finished", attempt=0, step=12)], State("finished")),
    "failed": ([events.Ended(event="failed", attempt=0, step=12, reason="ValueError: no")], State("failed")),
    "requeued": ([events.Requeued()] * 3, State("requeued")),
    "pending": ([events.Queued(time=time.time() - 7200, slurm_job_id="7")], PENDING),
    "hang": ([events.Hang(attempt=0, step=12, still_s=60)], RUNNING),
    "straggler": ([events.Straggler(attempt=0, rank=1, host="node1", reason="slow data")], RUNNING),
    "nan": ([events.BadStepEvent(event="not_finite", step=12)], RUNNING),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_told_of_each_kind_once(kind: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(KINDS) == set(NotifyOptions().events)
    happened, state = KINDS[kind]
    for event in happened:
        run.add_event(event)
    with HttpServer() as server:
        monkeypatch.setenv("HOOK", server.url)
        notify = {**vars(NotifyOptions()), "webhook_env": "HOOK"}
        run.config_path.write_text(yaml.safe_dump({"name": "digits", "notify": notify}))
        for _ in range(2):
            deliver(run, state, why_it_waits=lambda: ["Priority: 3 jobs are before it"])
        (post,) = server.posts
    assert post.body["event"] == kind
    assert (post.body["reason"] == "Priority: 3 jobs are before it") is (kind == "pending")
