"""`trainer fit cluster=slurm` trains what the same ranks train on one machine.

Two ranks of ddp on two nodes are in test_faults.py, of fsdp in test_local_disk.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import NODES, Testbed, wait_until
from tests.slurm.jobs import JOB, curve, on_slurm, paced, story, submit, wait_for_event, weights
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
STEPS = 12


@pytest.fixture
def debian_names(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each node maps its own name to 127.0.1.1, as Debian's installer does; the others know its address."""
    folder = tmp_path_factory.mktemp("hosts")
    for number in range(NODES):
        node = f"node{number}"
        hosts = testbed("exec", node, "cat", "/etc/hosts").stdout
        (folder / node).write_text(f"127.0.1.1 {node}\n" + hosts.replace(f" {node}\n", " elsewhere\n"))
        testbed("exec", node, "mount", "--bind", str(folder / node), "/etc/hosts")
    yield
    for number in range(NODES):
        testbed("exec", f"node{number}", "umount", "/etc/hosts")


def check_addresses(testbed: Testbed, run: RunDirectory) -> None:
    """That the ranks listen on the address of the node, though its own name is mapped to loopback: gloo and torchrun
    look up that name."""
    found = wait_for_event(run, "preflight", 240)
    assert found.bad == {}
    assert found.bytes_per_s > 1e6
    first = wait_for_event(run, "allocated", 240).nodes[0]
    wait_until(lambda: (beat := run.heartbeat(0)) is not None and beat.step > 0, 240, lambda: story(run))
    sockets = testbed("exec", first, "ss", "-Hltnp").stdout.splitlines()
    of_ranks = [line.split()[3] for line in sockets if '"rank ' in line or '"python' in line]
    address = testbed("exec", first, "hostname", "-I").stdout.strip()
    assert of_ranks
    assert {one.rpartition(":")[0] for one in of_ranks} == {address}, sockets
    (serving,) = re.findall(r"node 0 is (\S+) \(eth0\); node 0 serves (\S+):\d+", run.node_log(0, 0).read_text())
    assert serving == (address, address)


@pytest.mark.parametrize(
    "strategy",
    ["deepspeed_zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp", "deepspeed_zero1"))],
)
@pytest.mark.usefixtures("debian_names")
def test_two_nodes_of_two_ranks_end_with_the_weights_of_four_local_ranks(
    strategy: str, cli: TrainerCli, testbed: Testbed, workdir: Path
) -> None:
    job = [f"strategy={strategy}", f"trainer.max_steps={STEPS}", f"checkpoint.every_n_steps={STEPS}"]
    checked = ["cluster.preflight=true", "cluster.preflight_timeout_s=120"]
    submitted = submit(cli, workdir, *job, *on_slurm(ranks=4), *checked, *paced(1.0))
    assert "timeout 150 srun" in (submitted.path / "job.sbatch").read_text()
    check_addresses(testbed, submitted)
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
    job = [*JOB, *on_slurm(ranks=2, nodes=1), "--steps", "6", "--warmup", "2", "--for", "1h", "--json"]
    environment = {"XDG_CACHE_HOME": str(workdir / "cache"), "SBATCH_EXPORT": "NONE"}
    done = cli("time", *job, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["ranks"]) == (6, 2)
    assert report["fits"][0]["steps"] == int(3600 / report["step_s"])
    assert "submitted as job" in done.stderr or "finished" in done.stderr
    assert list((workdir / "cache/trainer/timings").glob("*.json"))
    assert not list((workdir / "runs").glob("*"))
