"""`trainer fit cluster=slurm` trains what the same ranks train on one machine; for ddp see also test_faults.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.jobs import JOB, curve, on_slurm, submit, wait_for_event, weights
from trainer.runs.bill import bill
from trainer.runs.events import Allocated

pytestmark = pytest.mark.slurm
STEPS = 12


@pytest.mark.parametrize(
    "strategy",
    ["fsdp", "deepspeed_zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "deepspeed_zero1"))],
)
def test_two_nodes_of_two_ranks_end_with_the_weights_of_four_local_ranks(
    strategy: str, cli: TrainerCli, workdir: Path
) -> None:
    job = [f"strategy={strategy}", f"trainer.max_steps={STEPS}", f"checkpoint.every_n_steps={STEPS}"]
    submitted = submit(cli, workdir, *job, *on_slurm(ranks=4))
    local = submit(cli, workdir, *job, "resources.cpu_processes=4")
    wait_for_event(submitted, "finished", timeout_s=300)
    assert weights(submitted, STEPS, workdir / "a") == weights(local, STEPS, workdir / "b") != {}
    assert curve(submitted) == curve(local)
    records = submitted.usage()
    assert {one.node for one in records} == {0, 1}
    assert len({one.host for one in records}) == 2
    (allocated, *_) = submitted.events_of(Allocated)
    # Held since the start of the allocation, so with the preflight.
    assert [one.began for one in records if one.attempt == allocated.attempt] == [allocated.since] * 2
    held_s = sum(one.seconds * one.devices for one in records)
    assert bill(submitted).total.cpu_core_hours == pytest.approx(held_s / 3600, rel=0.2)  # read a moment later


def test_steps_are_measured_by_a_short_job(cli: TrainerCli, workdir: Path) -> None:
    """`trainer time` submits it with a time limit of its own, follows it, and deletes its run. Many sites set that jobs
    inherit no environment, which srun would apply to what the job script tells the nodes as well."""
    job = [*JOB, *on_slurm(ranks=2), "--steps", "6", "--warmup", "2", "--for", "1h", "--json"]
    environment = {"XDG_CACHE_HOME": str(workdir / "cache"), "SBATCH_EXPORT": "NONE"}
    done = cli("time", *job, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["ranks"]) == (6, 2)
    assert report["fits"][0]["steps"] == int(3600 / report["step_s"])
    assert "submitted as job" in done.stderr or "finished" in done.stderr
    assert list((workdir / "cache/trainer/timings").glob("*.json"))
    assert not list((workdir / "runs").glob("*"))
