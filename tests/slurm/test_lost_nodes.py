"""A requeued job is kept off the nodes that its run has lost, unless it could then never start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed
from tests.slurm.jobs import on_slurm, submit
from trainer.runs.events import NodeLost
from trainer.slurm import lost_nodes, query

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("excluded", "afterwards"),
    [
        ([], "node3"),
        (["cluster.exclude='node[0-1]'"], "node[0-1]"),
    ],
    ids=["enough others", "its owner leaves out the others"],
)
def test_a_lost_node_is_left_out_where_enough_others_remain(
    cli: TrainerCli, testbed: Testbed, workdir: Path, excluded: list[str], afterwards: str
) -> None:
    run = submit(cli, workdir, "trainer.max_steps=4", *on_slurm(ranks=2), "cluster.extra=[hold]", *excluded)
    job_id = str(run.launch().slurm_job_id)
    run.add_event(NodeLost(node="node3", reason="down"))
    lost_nodes.exclude(run, job_id)
    assert query.job(job_id)["ExcNodeList"] == afterwards
