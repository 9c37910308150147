"""Checkpoints on disks that only their own node sees, on two nodes of SLURM: useful until a node is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import NODES, Testbed, wait_until
from tests.slurm.jobs import JOB, curve, kill, logged_steps, on_slurm, paced, story, submit, wait_for_event, weights
from trainer.cli import main
from trainer.core.errors import DONE
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, CheckpointSaved, Started

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SHARED, LOCAL, STEPS = 50, 5, 90
"""Steps between two saves to the run directory, to the disks, and of the whole training."""


def saved_since(run: RunDirectory, count: int, step: int) -> bool:
    """Whether a step of at least `step` was saved after the first `count` saves."""
    return any(one.step >= step for one in run.events_of(CheckpointSaved)[count:])


def test_a_killed_rank_costs_a_few_steps_and_a_lost_node_those_since_the_run_directory(
    cli: TrainerCli, testbed: Testbed, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = workdir / "disk"
    disk.mkdir()
    for number in range(NODES):  # in the mount namespace of the node, with which it goes
        testbed("exec", f"node{number}", "mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk))
    options = [f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "strategy=fsdp"]
    options += [f"checkpoint.every_n_steps={SHARED}", "checkpoint.save_best=false", "checkpoint.keep_last=9"]
    local = [f"checkpoint.local_dir={disk}", f"checkpoint.local_every_n_steps={LOCAL}"]
    run = submit(cli, workdir, *options, *local, *on_slurm(ranks=2), *paced(0.2), "resources.spare_nodes=0")

    def starts() -> list[int]:
        return [one.step for one in run.events_of(Started)]

    wait_until(lambda: saved_since(run, 0, 2 * LOCAL), 120, lambda: story(run))
    killed_on = run.events_of(Allocated)[-1].nodes[1]
    kill(testbed, killed_on, "^rank ")
    wait_until(lambda: len(starts()) == 2, 120, lambda: story(run))
    assert main(["why", str(run.path), "--json"]) == DONE
    (killed,) = [one for one in json.loads(capsys.readouterr().out)["attempts"] if one["reason"]]
    assert killed["reason"].startswith("rank 1 was killed by SIGKILL")
    assert killed["host"] == killed_on
    assert killed["log"].endswith("/rank-1.log")
    assert 2 * LOCAL <= starts()[1] < SHARED, "the restart did not use the disks"
    assert starts()[1] % LOCAL == 0

    before = len(run.events_of(CheckpointSaved))
    wait_until(lambda: saved_since(run, before, SHARED + 2 * LOCAL), 120, lambda: story(run))
    first, lost = run.events_of(Allocated)[-1].nodes
    folders = {node: testbed("exec", node, "find", str(disk), "-name", "step-*").stdout for node in (first, lost)}
    assert "node-0" in folders[first]
    assert "node-1" in folders[lost]
    assert "node-1" not in folders[first], "the disk is not the node's own"
    listed = json.loads(cli("show", str(run.path), "--json", cwd=workdir).stdout)["checkpoints"]
    on_nodes = [[one["host"] for one in row["nodes"]] for row in listed if row["local"]]
    assert on_nodes
    assert all(hosts == [first, lost] for hosts in on_nodes), listed
    allocations = len(run.events_of(Allocated))
    testbed("fail", lost)
    wait_until(lambda: len(starts()) == 3, 240, lambda: story(run))
    assert starts()[2] == SHARED, story(run)
    assert f"{lost} was lost (down" in run.attempts()[1].reason

    wait_for_event(run, "finished", timeout_s=240)
    assert sorted(set(logged_steps(run))) == logged_steps(run) == list(range(1, STEPS + 1))
    later = [one.nodes for one in run.events_of(Allocated)[allocations:]]
    assert later
    assert all(lost not in nodes for nodes in later)
    nodes = later[-1]
    for node in nodes:
        wait_until(lambda: testbed("exec", node, "find", str(disk), "-name", "step-*").stdout == "")  # noqa: B023
    for number in range(NODES):
        if f"node{number}" != lost:
            testbed("exec", f"node{number}", "umount", str(disk))

    unharmed = workdir / "unharmed"
    unharmed.mkdir()
    done = cli("fit", *JOB, *options, "resources.cpu_processes=2", "cluster=local", cwd=unharmed, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (unharmed / "runs").iterdir()
    expected = weights(RunDirectory(path), STEPS, workdir / "expected")
    assert weights(run, STEPS, workdir / "found") == expected
    assert curve(run) == curve(RunDirectory(path))
