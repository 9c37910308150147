"""The commands of README and docs that submit to SLURM, submitted as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.slurm.conftest import Testbed
from trainer.runs.directory import RunDirectory

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    {
        line.partition("  #")[0].strip()
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for line in page.read_text().splitlines()
        if line.startswith("trainer fit ") and "cluster=slurm" in line
    }
)


def test_the_pages_show_how_to_submit() -> None:
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_pages_submit_is_accepted(command: str, testbed: Testbed, cli: TrainerCli, workdir: Path) -> None:
    """Four nodes of four pretended GPUs make the 16; nothing could train on those, so it begins later."""
    done = cli(*shlex.split(command)[1:], 'cluster.extra=["begin=now+1hour"]')
    assert done.returncode == 0, done.stderr
    (path,) = (workdir / "runs").iterdir()
    job_id = str(RunDirectory(path).launch().slurm_job_id)
    job = testbed.slurm("scontrol", "show", "job", job_id)
    assert "Partition=gpu" in job
    assert "TimeLimit=04:00:00" in job
    assert "NumNodes=4" in job
    testbed.slurm("scancel", job_id)
