"""The node process that is started while its job is still being checked."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from trainer.core import processes
from trainer.core.errors import DONE, USER_MUST_CHANGE
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Created, FirstStep
from trainer.runs.starts import starts
from trainer.supervise import agent
from trainer.supervise.ahead import NodeAhead, NodeJob, StartImporting, receive, send

pytestmark = pytest.mark.executed

JOB = ("debug=fast", "resources.gpus=0", "resources.cpu_processes=2")


def _only_run(workdir: Path) -> tuple[RunDirectory, str]:
    (path,) = (workdir / "runs").iterdir()
    run = RunDirectory(path)
    return run, run.node_log(0, 0).read_text()


def test_what_was_imported_ahead_is_used_and_the_first_step_is_recorded_by_part(
    trainer_cli: TrainerCli, workdir: Path, no_orphans: None
) -> None:
    done = trainer_cli("fit", *JOB)
    assert done.returncode == DONE, done.stdout + done.stderr
    run, log = _only_run(workdir)
    assert "imports again" not in log
    (first,) = run.events_of(FirstStep)
    parts = ["node", "import", "config", "rendezvous", "build", "data", "first_step"]
    assert (first.attempt, first.step, sorted(first.seconds)) == (0, 1, sorted(parts))
    (created,) = run.events_of(Created)
    (start,) = starts(run)
    assert list(start["seconds"])[:3] == ["compose", "snapshot", "launch"]
    # What overlaps is counted once: the parts are the time from the command to the first step.
    whole_s = first.time - created.time + (created.compose_s or 0) + (created.snapshot_s or 0)
    assert start["total_s"] == pytest.approx(whole_s, abs=0.5)
    assert "first step" in trainer_cli("show").stdout


def test_a_job_with_other_variables_imports_again(trainer_cli: TrainerCli, workdir: Path, no_orphans: None) -> None:
    done = trainer_cli("fit", *JOB, "+hydra.job.env_set.MKL_CBWR=COMPATIBLE")
    assert done.returncode == DONE, done.stdout + done.stderr
    run, log = _only_run(workdir)
    assert "imports again for this job: MKL_CBWR differs" in log
    assert len(run.events_of(FirstStep)) == 1


@pytest.mark.parametrize(
    ("file", "shadows"),
    [("json.py", True), ("yaml/__init__.py", True), ("json/data.txt", False), ("json.txt", False), ("own.py", False)],
)
def test_code_that_has_a_module_of_an_imported_name_is_noticed(tmp_path: Path, file: str, shadows: bool) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    found = agent._shadowing([str(tmp_path)])
    assert found == (f"its code has {file.partition('/')[0]}" if shadows else None)


def test_a_job_with_a_mistake_leaves_no_process(trainer_cli: TrainerCli, workdir: Path, no_orphans: None) -> None:
    done = trainer_cli("fit", *JOB, "trainer.max_steps=0", "trainer.precision=17")
    assert done.returncode == USER_MUST_CHANGE
    assert not (workdir / "runs").exists()
    ahead = NodeAhead(dict(os.environ))
    ahead.close()
    assert not processes.is_alive(ahead.process.pid)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("OMP_NUM_THREADS", "3", "OMP_NUM_THREADS differs"),
        ("TRAINER_PRELOAD", "other", "TRAINER_PRELOAD differs"),
        ("TRAINER_STORE", "file:x", None),
        ("CUDA_VISIBLE_DEVICES", "0", None),
        ("PYTHONPATH", "/frozen", None),
    ],
)
def test_a_variable_that_imports_may_read_must_be_the_same(name: str, value: str, reason: str | None) -> None:
    before = {"OMP_NUM_THREADS": "1", "TRAINER_PRELOAD": "a"}
    assert agent._differing(before, {**before, name: value}) == reason


def test_a_job_that_comes_with_the_first_message_is_read_whole() -> None:
    """The check of a job may end before the process has read what it was started with."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as log:
        first, job = StartImporting(environment={"A": "1"}), NodeJob(run="runs/a", environment={"B": "2"})
        send(ours, first, [])
        send(ours, job, [log.fileno()])
        assert receive(theirs, StartImporting) == (first, [])
        received = receive(theirs, NodeJob)
        assert received is not None
        assert received[0] == job
        (descriptor,) = received[1]
        os.close(descriptor)
        ours.close()
        assert receive(theirs, NodeJob) is None
