"""Sweeps as job arrays on a real SLURM: one submission, kills, a crashed node, an absent controller, a lost note."""

from __future__ import annotations

import json
import os
import signal
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
    *on_slurm(1, nodes=1),
    "model.hidden=[8]",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=4",
    "resilience.max_restarts=0",
]


def status(cli: TrainerCli) -> dict[str, Any]:
    done = cli("sweep", "status", "--json", timeout=300)
    assert done.returncode == DONE, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def wait_over(cli: TrainerCli, sweep: SweepDirectory, timeout_s: float = 500) -> dict[str, Any]:
    def logs() -> str:
        return "\n".join(path.read_text()[-3000:] for path in sweep.logs_dir.glob("*"))

    def is_over() -> bool:
        return len(names := sweep.names()) == sweep.spec().trials and all(one.is_over for one in names.values())

    wait_until(is_over, timeout_s=timeout_s, why=logs)
    answer = status(cli)
    assert answer["is_over"], json.dumps(answer, indent=1)
    return answer


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
    points = ["+fail=false,true,null"]
    calls = shim(workdir, "sbatch", f'case "$*" in *--test-only*) ;; *) echo call >>{workdir}/calls;; esac')
    done = cli("sweep", *SWEEP, *bad, *points, "--at-once=2", "--json", env=calls, timeout=300)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert (workdir / "calls").read_text() == "call\n", "one submission for all trials"
    sweep = SweepDirectory(Path(json.loads(done.stdout)["path"]))
    ((array, job),) = sweep.arrays().values()
    assert job is not None
    assert (array.first, array.indices) == (0, "0-2")
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
    assert answer["counts"] == {"finished": 2, "failed": 1}, json.dumps(answer, indent=1)
    runs = [RunDirectory(Path(row["path"])) for row in answer["rows"]]
    assert len({run.path for run in runs}) == 3 == len(list((workdir / "runs").iterdir()))
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
    done = cli("sweep", *held, "--json", timeout=300)
    assert done.returncode == DONE, done.stderr
    sweep = SweepDirectory(Path(json.loads(done.stdout)["path"]))
    ((_, job),) = sweep.arrays().values()
    assert job is not None
    (sweep.arrays_dir / "000.job").unlink()
    assert cli("sweep", "resume", timeout=300).returncode == DONE
    assert [one for _, one in sweep.arrays().values()] == [job], "found again, and not submitted twice"
    assert testbed.jobs()
    assert {name.partition("_")[0] for name in testbed.jobs()} == {job.slurm_job_id}
    done = cli("sweep", "stop", timeout=300)
    assert done.returncode == DONE, done.stderr
    wait_until(lambda: not testbed.jobs())
    assert status(cli)["counts"] == {"waiting": 2}
    for name in sweep.arrays_dir.glob("*"):  # old enough that squeue would list them
        record = json.loads(name.read_text())
        if "time" in record:
            name.write_text(json.dumps({**record, "time": time.time() - 1000}))
    assert cli("sweep", "resume", timeout=300).returncode == DONE
    again = list(sweep.arrays().values())[-1][1]
    assert again is not None
    assert again.slurm_job_id != job.slurm_job_id
    listed = testbed.slurm("squeue", "--array", "--noheader", "--format=%F %K").splitlines()
    assert sorted(listed) == [f"{again.slurm_job_id} {index}" for index in range(2)], "both trials, submitted again"


def test_a_list_of_indices_is_short() -> None:
    assert compact([7, 0, 1, 2, 9]) == "0-2,7,9"
    assert expanded("0-2,7,9") == [0, 1, 2, 7, 9]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("method", "trials"), [("grid", 24), ("random", 12), ("sobol", 12), ("tpe", 12)])
def test_harmed_trials_end_as_unharmed_ones(
    cli: TrainerCli, workdir: Path, testbed: Testbed, method: str, trials: int, report: list[str]
) -> None:
    """Two processes are killed, a node crashes, the controller goes away, one trial always fails; serially: nothing."""
    job = [*SWEEP, "resilience.max_restarts=3"]  # else a killed node process is a failed trial, as the option says
    fails = "0.003-0.2-" if method == "grid" else "0.003-"
    (workdir / "own.py").write_text(BAD.replace("if self.when:", f"if self.when.startswith({fails!r}):"))
    bad = ["+callbacks.fails._target_=own.Fails", "model.dropout=0.0"]
    bad += ["+callbacks.fails.when=${optimizer.lr}-${model.dropout}-${seed}"]
    rates = "optimizer.lr=0.001,0.002,0.003,0.004,0.006,0.01"
    space = [rates, "model.dropout=0.0,0.1,0.2,0.3"] if method == "grid" else [rates, "seed=range(0,40)"]
    space += ["sweep.metric=train/loss"]
    space += [] if method == "grid" else [f"sweep.trials={trials}", f"sweep.method={method}"]
    space += ["sweep.generation=4"] if method == "tpe" else []
    if method == "tpe":
        pytest.importorskip("optuna")
    done = cli("sweep", *job, *bad, *space, "--at-once=4", "--json", timeout=120)
    assert done.returncode == DONE, done.stderr
    sweep = SweepDirectory(Path(json.loads(done.stdout)["path"]))

    def running() -> list[tuple[int, RunDirectory]]:
        found = []
        for number, names in sweep.names().items():
            record = sweep.run_of(number, names.runs[-1]) if names.runs and not names.is_over else None
            run = RunDirectory(Path(record.path)) if record else None
            if run is not None and (beat := run.heartbeat(0)) is not None and beat.step >= 1:
                found.append((number, run))
        return found

    for harm in ("kill", "crash", "controller", "kill"):
        _, run = wait_until(running, timeout_s=300, why=testbed.queue)[0]
        done_before = len([names for names in sweep.names().values() if names.is_over])
        print(f"{method}: {harm} after {done_before} of {trials} trials", flush=True)
        allocation = str(run.launch().slurm_job_id)
        if harm == "kill":
            for pid in [one for one in _pids() if f"sweep_task begin {sweep.path}" in one[1]][:1] or [
                one for one in _pids() if str(run.path) in one[1] and "supervise.node" in one[1]
            ][:1]:
                os.kill(pid[0], signal.SIGKILL)
        elif harm == "crash":
            testbed("crash", testbed.slurm("squeue", "-h", "-j", allocation, "-o", "%N").strip() or "node0")
        else:
            testbed("controller", "stop")
            time.sleep(10)
            testbed("controller", "start")
        time.sleep(2)
    deadline = time.monotonic() + 2400
    while not (answer := status(cli))["is_over"]:
        assert time.monotonic() < deadline, json.dumps(answer, indent=1)
        testbed.mend()
        cli("sweep", "resume", timeout=120)
        time.sleep(10)
    failed = [row for row in answer["rows"] if row["state"] == "failed"]
    assert len(answer["rows"]) == trials
    assert len(failed) >= 1
    assert all(row["parameters"]["optimizer.lr"] == "0.003" for row in failed)
    assert len(failed) == 1 or method != "grid"
    assert len({row["path"] for row in answer["rows"]}) == trials == len(list((workdir / "runs").iterdir()))
    for row in answer["rows"]:
        if row["state"] == "finished":
            assert steps_of(RunDirectory(Path(row["path"]))) == list(range(1, 13)), row
    serial = [*job, "cluster=local", "resources.nodes=1", *bad, *space, "name=serial", "--at-once=1", "--follow"]
    cli("sweep", *[one for one in serial if one not in ("cluster=slurm", "cluster.preflight=false")], timeout=2400)
    unharmed = json.loads(cli("sweep", "status", "--json", timeout=300).stdout)
    report.append(f"{method}: {answer['counts']}; best {answer['best']['trial']}, unharmed {unharmed['best']['trial']}")
    print(report[-1], flush=True)
    assert unharmed["counts"] == answer["counts"]
    assert unharmed["best"]["trial"] == answer["best"]["trial"]
    assert [row["values"] for row in unharmed["rows"]] == [row["values"] for row in answer["rows"]]


def _pids() -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        except OSError:
            continue
    return found
