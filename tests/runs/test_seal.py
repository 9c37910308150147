"""A sealed summary is true or not used, whatever happens to the run directory afterwards."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs.ended import GONE, ended_run, make_old, rewrite
from trainer.core import processes
from trainer.runs import ending, facts, seal
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended
from trainer.runs.index import Index, rows
from trainer.runs.records import AttemptOutcome, Evaluation, HeartbeatRecord
from trainer.runs.state import ended_state
from trainer.runs.summary import summary, summary_in_state


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def run(root: Path) -> RunDirectory:
    """A run that was sealed, and whose row is in the cache."""
    run = ended_run(root)
    assert rows(root)[0].state == "finished"
    assert run.summary_path.exists()
    assert [row.facts for row in rows(root)] == [summary(run)]
    return run


def record(run: RunDirectory, accuracy: float = 0.25) -> None:
    run.evaluations_dir.mkdir(exist_ok=True)
    evaluation = Evaluation(step=2, split="test", metrics={"test/acc": accuracy})
    (run.evaluations_dir / "step-00000002-test.json").write_text(json.dumps(evaluation.__dict__))


def resume_by_an_older_release(run: RunDirectory) -> None:
    alive = f'"pid": {os.getpid()}'
    rewrite(run.launch_path, f'"pid": {GONE}', alive)
    rewrite(run.launch_path, '"pid_started": 1', f'"pid_started": {processes.started_ticks(os.getpid())}')
    rewrite(run.launch_path, '"boot_id": null', f'"boot_id": "{processes.boot_id()}"')
    rewrite(run.launch_path, '"attempt": 0', '"attempt": 1')


def evaluate(run: RunDirectory) -> None:
    with seal.changing(run):
        record(run)


def record_another_end(run: RunDirectory) -> None:
    run.write_outcome(AttemptOutcome(attempt=0, outcome="stopped", reason="killed by a second Ctrl-C", step=3))


def damage(content: Callable[[bytes], bytes]) -> Callable[[RunDirectory], None]:
    return lambda run: (run.summary_path.write_bytes(content(run.summary_path.read_bytes())), None)[1]


def replace_by_fifo(run: RunDirectory) -> None:
    run.summary_path.unlink()
    os.mkfifo(run.summary_path)


def replace_by_link(run: RunDirectory) -> None:
    run.summary_path.rename(run.path.parent / "elsewhere.json")
    run.summary_path.symlink_to("/dev/zero")


def replace_by_folder(run: RunDirectory) -> None:
    run.summary_path.unlink()
    run.summary_path.mkdir()


CHANGES: dict[str, Callable[[RunDirectory], Any]] = {
    "a resume by a release that knows no seals": resume_by_an_older_release,
    "a checkpoint deleted by hand": lambda run: shutil.rmtree(run.checkpoints_dir / "step-00000002"),
    "all checkpoints deleted": lambda run: shutil.rmtree(run.checkpoints_dir),
    "an evaluation": evaluate,
    "another outcome": record_another_end,
    "another launch": lambda run: run.write_launch(run.launch()),
    "a changed byte": damage(lambda content: content.replace(b'"val/acc": 0.7', b'"val/acc": 0.8')),
    "an end cut off": damage(lambda content: content[:-20]),
    "nothing left": damage(lambda content: b""),
    "another release": damage(lambda content: content.replace(b'{"release": "', b'{"release": "9')),
    "a newer version": damage(lambda content: content.replace(b'{"release"', b'{"version": 2, "release"')),
    "a FIFO": replace_by_fifo,
    "a link": replace_by_link,
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "not cached"])
def test_a_list_after_a_change_is_what_the_directory_says(
    root: Path, run: RunDirectory, change: str, is_cached: bool
) -> None:
    CHANGES[change](run)
    if not is_cached:
        shutil.rmtree(root.parent / "cache")
    for _ in range(2):
        (row,) = [row for row in rows(root) if row.folder == str(run.path)]
        found, expected = [{**one, "ledger": None} for one in (row.facts, summary(run))]
        assert found == expected


def test_a_seal_has_every_fact(run: RunDirectory) -> None:
    sealed = seal.read(str(run.path))
    assert sealed is not None
    sealed_summary = seal.parse(sealed.content)
    assert sealed_summary is not None
    assert list(sealed.facts) == list(summary(run))
    assert set(summary(run)) == {"id", "name", "path", *facts._FORMS}, "a new key needs its type in runs/facts.py"
    assert sealed_summary.config["model"] == "mlp"
    assert sealed_summary.config["trainer.max_steps"] == 3
    ranges = seal.ranges_of(sealed_summary)
    assert ranges is not None
    assert ranges["val/acc"].best("max") == (0.9, 2)
    assert seal.ranges_of(replace(sealed_summary, ranges={"val/acc": {"last": []}})) is None
    assert sealed.facts["best"]["value"] == 0.9


def test_copied_moved_and_renamed_runs(root: Path, run: RunDirectory, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", root, tmp_path / "copy"], check=True)
    copy = tmp_path / "copy" / run.path.name
    assert seal.read(str(copy)) is None
    assert [row.facts for row in rows(tmp_path / "copy")] == [summary(RunDirectory(copy))]
    root.rename(tmp_path / "moved")
    moved = RunDirectory(tmp_path / "moved" / run.path.name)
    sealed = seal.read(str(moved.path))
    assert sealed is not None
    assert sealed.facts == summary(moved)
    renamed = moved.path.rename(moved.path.with_name("other-aaaaaaaa"))
    assert seal.read(str(renamed)) is None
    assert [row.facts for row in rows(tmp_path / "moved")] == [summary(RunDirectory(renamed))]


@pytest.fixture
def evaluation(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """A process that evaluates the run, and waits before its result."""
    code = (
        "import sys; from pathlib import Path; from trainer.runs.seal import changing\n"
        "from trainer.runs.directory import RunDirectory\n"
        "with changing(RunDirectory(Path(sys.argv[1]))):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield child
    child.kill()
    child.communicate()


def test_a_killed_evaluation_leaves_no_lie(root: Path, run: RunDirectory, evaluation: subprocess.Popen[str]) -> None:
    assert not run.summary_path.exists()
    assert rows(root)[0].facts["evaluations"] == []
    assert not run.summary_path.exists()  # nobody seals while it is being changed
    record(run)
    evaluation.kill()
    evaluation.wait()
    assert rows(root)[0].facts["evaluations"][0]["metrics"] == {"test/acc": 0.25}
    make_old(run)
    rows(root)
    assert run.summary_path.exists()
    assert rows(root)[0].facts == summary(run)


def test_the_end_of_a_job_seals_it(root: Path) -> None:
    run = ended_run(root, outcome=None)
    assert not ending.seal_ended(run)  # nobody has recorded an end
    run.write_outcome(AttemptOutcome(attempt=0, outcome="finished", step=3))
    run.add_event(Ended(event="finished", attempt=0, step=3))
    assert ending.seal_ended(run)
    assert [row.facts for row in rows(root)] == [summary(run)]
    run.write_outcome(AttemptOutcome(attempt=0, outcome="requeue", step=3))
    assert not run.summary_path.exists()
    assert not ending.seal_ended(run)


def test_a_reader_waits_until_nothing_changes(root: Path) -> None:
    run = ended_run(root)
    run.events_path.touch()
    rows(root)
    assert not run.summary_path.exists()
    make_old(run)
    os.utime(run.launch_path, (time.time() + 1000, time.time() + 1000))  # copied from a machine whose clock is ahead
    rows(root)
    assert run.summary_path.exists()
    os.utime(run.launch_path, (time.time() + 2000, time.time() + 2000))
    assert seal.read(str(run.path)) is None


def test_times_that_may_come_again_are_not_sealed() -> None:
    tick, second = 20 * 10**6, 10**9
    fine = {"a": [1000 * second + 1, 1, 1], "b": []}
    assert not seal.is_settled(fine, 1000 * second + tick // 2)
    assert seal.is_settled(fine, 1000 * second + tick + 1)
    coarse = {"a": [1000 * second, 1, 1]}
    assert not seal.is_settled(coarse, 1000 * second + second)
    assert seal.is_settled(coarse, 1002 * second)
    assert not seal.is_settled(coarse, 1002 * second, waits_ns=5 * second)
    assert seal.is_settled(coarse, 900 * second, waits_ns=5 * second)  # in the future


def test_what_changes_while_it_is_read_is_not_sealed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended_run(root)
    sources = seal.signatures(run)
    known = summary_in_state(run, ended_state(run, run.launch()), run.config())
    run.metrics_path.write_text("")
    assert not seal.write(run, seal.summary_of(run, known, {}, sources, True))
    assert list(run.path.glob("*summary*")) + list(run.path.glob(".summary*")) == []
    sources = seal.signatures(run)
    assert seal.write(run, seal.summary_of(run, known, {}, sources, True))


@pytest.mark.parametrize(
    ("host", "beat_s", "state", "is_sealed"),
    [
        (socket.gethostname(), 3600, "dead", True),
        ("elsewhere", 3600, "dead", False),
        ("elsewhere", 0, "running", False),
    ],
)
def test_a_run_without_an_outcome(root: Path, host: str | None, beat_s: float, state: str, is_sealed: bool) -> None:
    run = ended_run(root, outcome=None)
    rewrite(run.launch_path, socket.gethostname(), host or socket.gethostname())
    run.write_heartbeat(0, HeartbeatRecord(time=time.time() - beat_s, phase="train"))
    make_old(run)
    assert rows(root)[0].state == state
    assert run.summary_path.exists() is is_sealed


def test_slurm_is_asked_about_a_job_that_may_run_again(root: Path) -> None:
    over, failed = ended_run(root, "over", job="7"), ended_run(root, "failed", "failed", job="8")
    asked: list[list[str]] = []
    queue: dict[str, str] = {}

    def query(job_ids: list[str]) -> dict[str, str]:
        asked.append(job_ids)
        return queue

    def states() -> dict[str, str]:
        return {row.name: row.state for row in rows(root, query)}

    assert {row.name: row.state for row in rows(root)} == {"over": "finished", "failed": "failed"}
    assert over.summary_path.exists()
    assert not failed.summary_path.exists()  # nobody has asked
    assert states() == {"over": "finished", "failed": "failed"}
    assert failed.summary_path.exists()
    queue["8"] = "PENDING"
    assert states()["failed"] == states()["failed"] == "requeued"
    assert set(map(tuple, asked)) == {("8",)}


def test_a_run_of_somebody_else_is_not_sealed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended_run(root)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "no cache"))
    index = Index(root)
    index.refresh()
    assert not run.summary_path.exists()
    record(run)
    index.refresh()
    assert index.rows()[0].facts["evaluations"] != []
