"""What a person at the prompt sees of a run in the queue, at work, requeued, stopped and dead."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TrainerCli, clean_environment
from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import on_slurm, paced, story, submit, wait_for_event, wait_for_step
from trainer.cli import main
from trainer.core.errors import DONE
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
JOB = ["cluster=slurm", "experiment=quickstart", "tracking=none", "resources.nodes=2", "resources.gpus=8"]
BROKEN = '''
import os
import signal
import subprocess

from lightning.pytorch import Callback


class Broken(Callback):
    """Has SLURM requeue the job before its first checkpoint, and saves nothing."""

    def on_train_batch_end(self, *arguments):
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        os.kill(os.getpid(), signal.SIGKILL)
'''
WAITING = {
    "cluster.extra=[hold]": "held by its owner; `scontrol release {job}` releases it",
    "cluster.qos=single": (
        "the QOS single is reached (QOSMaxNodePerUserLimit): MaxTRESPU node is 1, used 0; "
        "the job requests 2 nodes with 8 GPUs in total"
    ),
    "cluster.extra=['begin=now+1hour']": "it cannot start for another 3",
}


def last_run() -> RunDirectory:
    return all_runs(Path("runs"))[-1]


@pytest.mark.parametrize("override", WAITING)
def test_why_a_job_waits_is_a_sentence_with_its_numbers(
    override: str, workdir: Path, testbed: Testbed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *JOB, override]) == DONE
    job = str(last_run().launch().slurm_job_id)
    wait_until(lambda: "(None)" not in testbed.slurm("squeue", "-hj", job, "-o", "%R"))
    assert main(["why", job]) == DONE
    assert WAITING[override].format(job=job) in capsys.readouterr().out


def test_a_job_that_waits_for_nodes_says_which_are_taken_and_when_it_may_start(
    workdir: Path, testbed: Testbed, capsys: pytest.CaptureFixture[str]
) -> None:
    testbed.slurm("sbatch", "--nodes=2", "--exclusive", "--time=10", "--output=/dev/null", "--wrap=sleep 600")
    assert main(["fit", *JOB, "resources.nodes=4", "resources.gpus=16", "cluster.time='00:30:00'"]) == DONE
    job = str(last_run().launch().slurm_job_id)
    wait_until(lambda: "(Resources)" in testbed.slurm("squeue", "-hj", job, "-o", "%R"))
    wait_until(lambda: "N/A" not in testbed.slurm("squeue", "-hj", job, "-o", "%S"))
    assert main(["why", "--json"]) == DONE
    sentence, expected = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["why"]
    assert sentence.startswith("waiting for 4 nodes with 16 GPUs in total of the partition main, whose nodes are: 2 a")
    assert "SLURM expects it to start at " in expected


def test_fifty_submissions_cost_less_than_a_second_of_cpu_each_and_one_call_for_all_states(
    cli: TrainerCli, workdir: Path, testbed: Testbed
) -> None:
    count = 50
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cli("fit", "-m", *JOB, f"seed=range(0,{count})", "cluster.extra=[hold]", timeout=250)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == DONE, done.stderr
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s / count < 1
    assert len(testbed.jobs()) == 1, "one job array"
    assert len(testbed.slurm("squeue", "--array", "--noheader").splitlines()) == count

    count = 4
    for seed in range(count):
        assert cli("fit", *JOB, f"seed={seed}", "cluster.extra=[hold]", timeout=300).returncode == DONE
    calls = workdir / "calls"
    for program in ("squeue", "scontrol", "sacct", "sinfo"):
        shim = workdir / "bin" / program
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(f'#!/bin/sh\necho {program} >>{calls}\nexec /usr/bin/{program} "$@"\n')
        shim.chmod(0o755)
    listed = cli("ls", "--json", env={"PATH": f"{workdir / 'bin'}{os.pathsep}{os.environ['PATH']}"})
    assert [one["state"] for one in json.loads(listed.stdout)] == ["queued"] * count
    assert calls.read_text() == "squeue\n"


def test_a_run_is_followed_through_a_requeue_and_ends_for_good_when_it_is_stopped(
    cli: TrainerCli, workdir: Path, testbed: Testbed, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(
        cli, workdir, "trainer.max_steps=5000", "checkpoint.every_n_steps=2", *on_slurm(1, nodes=1), *paced(0.5)
    )
    job = str(run.launch().slurm_job_id)
    with (workdir / "followed").open("w") as log:
        follower = subprocess.Popen(
            [sys.executable, "-m", "trainer", "logs", "-f", run.id],
            env={**clean_environment(), "SLURM_CONF": testbed.conf},
            cwd=workdir,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for_step(run, 2)
        testbed.slurm("scontrol", "requeue", job)
        wait_for_event(run, "requeued")
        assert main(["ls", "--json"]) == DONE
        assert json.loads(capsys.readouterr().out)[0]["state"] in ("stopping", "requeued", "starting")
        wait_for_event(run, "started", attempt=1)
        assert main(["stop", run.id, "--wait", "90"]) == DONE, story(run)
        assert ": stopped (stop requested)" in capsys.readouterr().out
        follower.wait(300)
    finally:
        follower.kill()
        follower.wait()
    followed = (workdir / "followed").read_text()
    assert followed.count("attempt 0: from the start") == 1
    assert "==> attempt-01 <==\nattempt 1: resumed from step " in followed
    assert "stopped at step " in followed
    wait_until(lambda: testbed.slurm("squeue", "-t", "all", "-hj", job, "-o", "%T").strip() == "COMPLETED")
    assert [one.event for one in run.events()].count("requeued") == 1


def test_a_job_that_waits_is_stopped_by_taking_it_from_the_queue(
    workdir: Path, testbed: Testbed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *JOB, "cluster.extra=[hold]"]) == DONE
    assert main(["stop"]) == DONE
    assert ": stopped (stopped while it waited)" in capsys.readouterr().out
    assert not testbed.jobs()


def test_an_import_error_is_never_requeued(cli: TrainerCli, workdir: Path, testbed: Testbed) -> None:
    (workdir / "broken.py").write_text("import not_there_at_all\n\n\nclass Broken: ...\n")
    run = submit(cli, workdir, "trainer.max_steps=9", "+callbacks.broken._target_=broken.Broken", *on_slurm(1, nodes=1))
    job = str(run.launch().slurm_job_id)
    wait_for_event(run, "failed")
    wait_until(lambda: testbed.slurm("squeue", "-t", "all", "-hj", job, "-o", "%T").strip() == "FAILED")
    why = cli("why", run.id)
    assert "is failed: ModuleNotFoundError: No module named 'not_there_at_all'" in why.stdout
    assert len(run.attempts()) == 1


def test_a_run_that_gets_nowhere_stops_with_the_reason(cli: TrainerCli, workdir: Path, testbed: Testbed) -> None:
    (workdir / "broken.py").write_text(BROKEN)
    run = submit(
        cli,
        workdir,
        "resilience.max_restarts=0",
        "trainer.max_steps=9",
        "+callbacks.broken._target_=broken.Broken",
        *on_slurm(1, nodes=1),
    )
    job = str(run.launch().slurm_job_id)
    failed = wait_for_event(run, "failed", 200)
    assert failed.reason == (
        "2 attempts in a row left no newer checkpoint; the last one: not saved: requeued by scontrol"
    )
    wait_until(lambda: testbed.slurm("squeue", "-t", "all", "-hj", job, "-o", "%T").strip() == "FAILED")
    assert [one.event for one in run.events()].count("allocated") == 2
