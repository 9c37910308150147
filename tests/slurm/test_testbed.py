from __future__ import annotations

import pytest

from tests.slurm.conftest import Testbed, wait_until

pytestmark = pytest.mark.slurm


def test_nodes_have_their_own_names_and_gpus(testbed: Testbed) -> None:
    printed = testbed.slurm("srun", "-N2", "--gpus-per-node=2", "bash", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert sorted(printed.splitlines()) == ["node0 0,1", "node1 0,1"]


def test_a_crashed_node_is_down_and_comes_back(testbed: Testbed) -> None:
    testbed("fail", "node1")
    assert "node1 down" in testbed("status").stdout
    testbed("boot", "node1")
    wait_until(lambda: "node1 idle" in testbed("status").stdout)


def test_accounting_knows_a_job_that_ended(testbed: Testbed) -> None:
    job = testbed.slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3").strip()
    accounted = ("sacct", "-nPX", "-j", job, "-o", "state,exitcode")
    assert wait_until(lambda: "3:0" in testbed.slurm(*accounted) and testbed.slurm(*accounted)) == "FAILED|3:0\n"
