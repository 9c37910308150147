"""Step 0 of a job: a node that is not fit is named, and left out where there is a spare one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import on_slurm, submit, wait_for_event
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
