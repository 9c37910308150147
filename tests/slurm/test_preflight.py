"""Step 0 of a job: a node that is not fit is named, and left out where there is a spare one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import NODES, Testbed, wait_until
from tests.slurm.jobs import on_slurm, paced, story, submit, wait_for_event
from trainer.runs.events import Preflight

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
DATA = '''
from trainer.data.digits import Digits


class Stored(Digits):
    """Digits that claim to be in a folder."""

    def __init__(self, folder, batch_size):
        super().__init__(batch_size)
'''


def job(folder: Path) -> list[str]:
    options = ["data._target_=stored.Stored", f"+data.folder={folder}", "data.batch_size=32", "trainer.max_steps=4"]
    return [*options, *on_slurm(ranks=2), "cluster.preflight=true"]


@pytest.fixture
def hidden(testbed: Testbed, workdir: Path) -> Path:
    """A folder of data that node0 does not see."""
    folder = workdir / "data"
    folder.mkdir()
    (folder / "there").mkdir()
    (workdir / "stored.py").write_text(DATA)
    testbed("exec", "node0", "mount", "-t", "tmpfs", "none", str(folder))
    return folder / "there"


def test_a_bad_node_is_named_and_fails_the_job_or_is_left_out(
    hidden: Path, cli: TrainerCli, workdir: Path, testbed: Testbed
) -> None:
    complaint = f"it cannot see {hidden}"
    run = submit(cli, workdir, *job(hidden), "cluster.exclude='node2,node3'")
    with_spare = submit(
        cli, workdir, *job(hidden), "resources.spare_nodes=1", "cluster.exclude=node3", "cluster.extra=[exclusive]"
    )
    failed = wait_for_event(run, "failed", 240)
    assert failed.reason == f"preflight: node0: {complaint}"
    state = ["squeue", "-t", "all", "-hj", str(run.launch().slurm_job_id), "-o", "%T"]
    wait_until(lambda: testbed.slurm(*state).strip() == "FAILED")

    allocated = wait_for_event(with_spare, "allocated", 240)
    assert allocated.nodes == ["node1", "node2"]
    (found,) = with_spare.events_of(Preflight)
    assert found.bad == {"node0": complaint}
    wait_for_event(with_spare, "finished", 240)


@pytest.fixture
def debian_names(testbed: Testbed, tmp_path: Path) -> Iterator[None]:
    """Each node maps its own name to 127.0.1.1, as Debian's installer does; the others know its address."""
    for number in range(NODES):
        node = f"node{number}"
        hosts = testbed("exec", node, "cat", "/etc/hosts").stdout
        (tmp_path / node).write_text(f"127.0.1.1 {node}\n" + hosts.replace(f" {node}\n", " elsewhere\n"))
        testbed("exec", node, "mount", "--bind", str(tmp_path / node), "/etc/hosts")
    yield
    for number in range(NODES):
        testbed("exec", f"node{number}", "umount", "/etc/hosts")


@pytest.mark.usefixtures("debian_names")
def test_nodes_whose_names_are_mapped_to_loopback_reduce_and_train(
    cli: TrainerCli, workdir: Path, testbed: Testbed
) -> None:
    """gloo and torchrun look up the name of the machine, and find an address that no other node reaches."""
    job = ["trainer.max_steps=40", *paced(0.2), *on_slurm(ranks=2)]
    run = submit(cli, workdir, *job, "cluster.preflight=true", "cluster.preflight_timeout_s=120")
    assert "timeout 150 srun" in (run.path / "job.sbatch").read_text()
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
    wait_for_event(run, "finished", 240)
    (serving,) = re.findall(r"node 0 is (\S+) \(eth0\); node 0 serves (\S+):\d+", run.node_log(0, 0).read_text())
    assert serving == (address, address)
