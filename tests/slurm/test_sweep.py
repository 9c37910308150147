"""Sweeps as job arrays on a real SLURM: one submission, kills, a crashed node, an absent controller, a lost note."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import JOB, on_slurm
from trainer.core.errors import DONE
from trainer.runs.directory import RunDirectory
from trainer.sweeps.arrays import compact, expanded
from trainer.sweeps.directory import SweepDirectory

pytestmark = pytest.mark.slurm
BAD = """
from lightning.pytorch import Callback


class Fails(Callback):
    def __init__(self, when):
        self.when = when

    def on_train_batch_end(self, trainer, *arguments):
        if self.when:
            raise ValueError("this trial always fails")
"""
SWEEP = [
    *JOB,
    *on_slurm(2, nodes=1),
    "model.hidden=[8]",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=4",
    "resilience.max_restarts=0",
]


def status(cli: TrainerCli) -> dict[str, Any]:
    done = cli("sweep", "status", "--json", timeout=60)
    assert done.returncode == DONE, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def wait_over(cli: TrainerCli, sweep: SweepDirectory, timeout_s: float = 500) -> dict[str, Any]:
    def logs() -> str:
        return "\n".join(path.read_text()[-3000:] for path in sweep.logs_dir.glob("*"))

    found = wait_until(lambda: (now := status(cli))["is_over"] and now, timeout_s=timeout_s, why=logs)
    assert isinstance(found, dict)
    return found


def steps_of(run: RunDirectory) -> list[int]:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def shim(workdir: Path, program: str, line: str) -> dict[str, str]:
    """A PATH on which `program` first runs a line of shell."""
    file = workdir / "bin" / program
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'#!/bin/sh\n{line}\nexec /usr/bin/{program} "$@"\n')
    file.chmod(0o755)
    return {"PATH": f"{file.parent}{os.pathsep}{os.environ['PATH']}"}


def test_a_sweep_on_slurm_survives_what_is_killed(cli: TrainerCli, workdir: Path, testbed: Testbed) -> None:
    (workdir / "own.py").write_text(BAD)
    bad = ["+callbacks.fails._target_=own.Fails", "+callbacks.fails.when=${fail}"]
    points = ["+fail=false,true", "optimizer.lr=0.001,0.01"]
    calls = shim(workdir, "sbatch", f'case "$*" in *--test-only*) ;; *) echo call >>{workdir}/calls;; esac')
    done = cli("sweep", *SWEEP, *bad, *points, "--at-once=2", "--json", env=calls, timeout=60)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert (workdir / "calls").read_text() == "call\n", "one submission for all trials"
    sweep = SweepDirectory(Path(json.loads(done.stdout)["path"]))
    ((array, job),) = sweep.arrays().values()
    assert job is not None
    assert (array.first, array.indices) == (0, "0-3")
    assert "ArrayTaskThrottle=2" in testbed.slurm("scontrol", "show", "job", job.slurm_job_id)

    # A node with a training on it crashes: SLURM requeues the task, which resumes its own run.
    def training() -> str | None:
        for names in sweep.names().values():
            record = sweep.run_of(0, names.runs[-1]) if names.runs else None
            run = RunDirectory(Path(record.path)) if record else None
            if run is not None and (beat := run.heartbeat(0)) is not None and beat.step >= 1:
                return testbed.slurm("squeue", "-h", "-j", str(run.launch().slurm_job_id), "-o", "%N").strip()
        return None

    node = wait_until(training, timeout_s=120, why=testbed.queue)
    testbed("crash", node)
    answer = wait_over(cli, sweep)
    assert answer["counts"] == {"finished": 2, "failed": 2}, json.dumps(answer, indent=1)
    runs = [RunDirectory(Path(row["path"])) for row in answer["rows"]]
    assert len({run.path for run in runs}) == 4 == len(list((workdir / "runs").iterdir()))
    for run, row in zip(runs, answer["rows"], strict=True):
        if row["state"] == "finished":
            assert steps_of(run) == list(range(1, 13)), "each step once"
        else:
            assert "this trial always fails" in row["reason"]
    assert (workdir / "calls").read_text() == "call\n"


def test_a_submission_whose_note_was_lost_is_found_by_its_comment(
    cli: TrainerCli, workdir: Path, testbed: Testbed
) -> None:
    held = [*SWEEP, "cluster.extra=[hold]", "seed=1,2"]
    done = cli("sweep", *held, "--json", timeout=60)
    assert done.returncode == DONE, done.stderr
    sweep = SweepDirectory(Path(json.loads(done.stdout)["path"]))
    ((_, job),) = sweep.arrays().values()
    assert job is not None
    (sweep.arrays_dir / "000.job").unlink()
    assert cli("sweep", "resume", timeout=60).returncode == DONE
    assert [one for _, one in sweep.arrays().values()] == [job], "found again, and not submitted twice"
    assert testbed.jobs()
    assert {name.partition("_")[0] for name in testbed.jobs()} == {job.slurm_job_id}
    done = cli("sweep", "stop", timeout=60)
    assert done.returncode == DONE, done.stderr
    wait_until(lambda: not testbed.jobs())
    assert status(cli)["counts"] == {"waiting": 2}
    (sweep.path / "sweep.sbatch").write_text(
        re.sub(r"(?m)^#SBATCH --hold\n", "", (sweep.path / "sweep.sbatch").read_text())
    )
    for name in sweep.arrays_dir.glob("*"):  # old enough that squeue would list them
        record = json.loads(name.read_text())
        if "time" in record:
            name.write_text(json.dumps({**record, "time": time.time() - 1000}))
    assert cli("sweep", "resume", timeout=60).returncode == DONE
    assert wait_over(cli, sweep)["counts"] == {"finished": 2}


def test_a_list_of_indices_is_short() -> None:
    assert compact([7, 0, 1, 2, 9]) == "0-2,7,9"
    assert expanded("0-2,7,9") == [0, 1, 2, 7, 9]
