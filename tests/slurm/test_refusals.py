"""What the cluster would refuse, never run, or misread is refused at the prompt, and no run is made for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.slurm.conftest import Testbed
from trainer.cli import main
from trainer.config.cluster import Slurm
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, USER_MUST_CHANGE
from trainer.runs.registry import all_runs
from trainer.slurm.options import check_values

pytestmark = pytest.mark.slurm
JOB = ["cluster=slurm", "experiment=quickstart", "tracking=none", "resources.nodes=2", "resources.gpus=8"]
REFUSED = {
    "cluster.partition=mian": "did you mean cluster.partition=main? it has closed, gpu, main, private, short, urgent",
    "cluster.partition=closed": "the partition closed takes no jobs now",
    "cluster.account=chemistry": "cluster.account=chemistry: you may not use it\n  yours: physics, root",
    "cluster.qos=high": "cluster.qos=high: you may not use it\n  yours: normal, single",
    "cluster.partition=private cluster.account=physics": "the partition private does not allow it\n  it allows others",
    "cluster.partition=private": "SLURM refuses the job: Invalid account or account/partition combination",
    "cluster.partition=short resources.nodes=1 resources.gpus=4 cluster.time='00:20:00'": (
        "cluster.time=00:20:00 is more than the partition short allows\n  use cluster.time=0-00:10:00 or less"
    ),
    "cluster.partition=short": "the partition short has 1 that fit\n  use resources.nodes=1 or fewer",
    "resources.nodes=8 resources.gpus=32": "resources.nodes=8: the partition main has 4 that fit",
    "resources.nodes=2 resources.gpus=8 resources.spare_nodes=3": "resources.nodes=2 and resources.spare_nodes=3",
    "resources.nodes=4 resources.gpus=4 resources.min_nodes=3": "use data.batch_size=36 (and a strategy.shard_size",
    "resources.gpus=16": "resources.gpus_per_node=8: a node of the partition main has 4 at most",
    "cluster.gpu_type=h100": "the partition main has no such GPU\n  did you mean cluster.gpu_type=a100?",
    "resources.gpus=7": "is not divisible by resources.nodes=2\n  use resources.gpus=6 or 8",
    "resources.gpus=null resources.nodes=null": "set it: resources.gpus=8, or resources.gpus=0",
    "cluster.cpus_per_process=3": "use cluster.cpus_per_process=2 or fewer",
    "cluster.memory_per_process=3G": "use cluster.memory_per_process=2000M or less",
    "cluster.time='00:02:00'": "the checkpoint is saved 180 s before the time limit",
    "cluster.time=20": "write D-HH:MM:SS or HH:MM:SS",
    "cluster.extra=[exclusve]": "this sbatch has no option --exclusve\n  did you mean exclusive?",
    "cluster.extra=['array=1-3']": "--array would break requeueing of the job",
    "cluster.extra=['time=3']": "--time is set by cluster.time",
    "cluster.container_runtime=docker": "invalid choice\n  choose one of: apptainer, pyxis",
    "cluster.reservation=nope": "SLURM refuses the job: Requested reservation is invalid",
    "cluster.constraint=h200": "SLURM refuses the job: Invalid feature specification",
    "cluster.exclude='node0,node1,node2'": "SLURM refuses the job: Requested node configuration is not available",
    "cluster.exclude=node77": "SLURM refuses the job: Invalid node name specified",
    "cluster.mail_type=SOMETIMES": "SLURM refuses the job: Invalid --mail-type specification",
}
"""Overrides to what the message says."""
HOSTILE = [
    "a\nb",
    "a\r\n#SBATCH --wrap=x",
    '"; touch pwned; "',
    "$(touch pwned)",
    "`touch pwned`",
    "a b",
    "a'b",
    "ü\u2028x",
]
FIELDS = [
    *("partition", "account", "qos", "time", "gpu_type", "memory_per_process", "exclude", "constraint", "reservation"),
    *("dependency", "mail_user", "mail_type", "container"),
]
LISTS = ["modules", "container_mounts", "extra"]
LITERAL = ["$(touch pwned)", "`touch pwned`", '"; touch pwned; "', "a b", "a'b", "ü", "a\\", "~", "*", "#x", "%j"]
"""Values that a name of a folder may have."""


Fit = Callable[..., tuple[int, str]]


@pytest.fixture
def fit(workdir: Path, testbed: Testbed, capsys: pytest.CaptureFixture[str]) -> Fit:
    """`trainer fit` in this process: its code and what it complains of."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["fit", *JOB, *arguments])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_run_is_refused_before_a_run_is_made(overrides: str, fit: Fit, workdir: Path) -> None:
    code, message = fit(*overrides.split(" "))
    assert code == USER_MUST_CHANGE
    assert REFUSED[overrides] in message
    assert not (workdir / "runs").exists()


def quoted(value: str) -> str:
    """As Hydra reads it back literally."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


@pytest.mark.parametrize("field", [*FIELDS, *LISTS])
def test_hostile_values_are_refused_in_every_option(field: str, fit: Fit, workdir: Path) -> None:
    code, message = fit(f"cluster.{field}=" + (f"[{quoted(HOSTILE[0])}]" if field in LISTS else quoted(HOSTILE[0])))
    assert code == USER_MUST_CHANGE
    assert f"cluster.{field}" in message
    assert list(workdir.iterdir()) == []
    for value in HOSTILE:
        options = {**asdict(Slurm()), field: [value] if field in LISTS else value}
        assert any(f"cluster.{field}" in problem.message for problem in check_values(options)), value


def test_names_and_lines_of_bash_cannot_break_out_of_their_line(fit: Fit, workdir: Path) -> None:
    for override in ["name=" + quoted(value) for value in HOSTILE]:
        assert fit(override)[0] == USER_MUST_CHANGE
    for value in HOSTILE[:2] + HOSTILE[-1:]:
        for key in (f"cluster.setup=[{quoted(value)}]", f"cluster.python={quoted(value)}"):
            assert fit(key)[0] == USER_MUST_CHANGE, (key, value)
    assert not (workdir / "pwned").exists()


@pytest.mark.parametrize("name", LITERAL)
def test_a_folder_of_any_name_arrives_literally_or_is_refused(
    name: str, fit: Fit, workdir: Path, testbed: Testbed
) -> None:
    """The script of a run in such a folder is run by bash with every command replaced by one that prints its words."""
    folder = workdir / name
    folder.mkdir()
    code, message = fit("runs_dir=" + quoted(str(folder)), "cluster.python=" + quoted(name), "--detach")
    if code != DONE:
        assert "cannot be written in a job script" in message
        return
    (run,) = all_runs(folder)
    testbed.slurm("scancel", str(run.launch().slurm_job_id))
    words = 'srun() { printf "%s\\n" "$@"; }; exit() { :; }; '
    script = (run.path / "job.sbatch").read_text()
    assert f'#SBATCH --output="{run.path}/logs/' in script or f"#SBATCH --output={run.path}/logs/" in script
    line = next(line for line in script.splitlines() if line.lstrip().startswith("srun ")).strip().removesuffix(" &")
    printed = subprocess.run(
        ["bash", "-c", f"{words} run_dir={script.split('run_dir=')[1].splitlines()[0]}; {line}"],
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    assert printed.splitlines()[-4:] == [name, "-m", "trainer.supervise.node", str(run.path)]
    assert not (workdir / "pwned").exists()


def test_a_submission_while_the_controller_is_away_is_kept_and_submitted_later(
    fit: Fit, workdir: Path, testbed: Testbed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.slurm import submit

    checks = submit.submit

    def stop_and_submit(*arguments: object) -> str:
        testbed("controller", "stop")
        return checks(*arguments)

    monkeypatch.setattr(submit, "submit", stop_and_submit)
    try:
        code, message = fit("cluster.extra=[hold]")
        assert code == ENVIRONMENT_MUST_CHANGE
        assert "SLURM does not respond" in message
        (run,) = all_runs(workdir / "runs")
        assert f"the run is kept: trainer resume {run.id} submits it again" in message
    finally:
        testbed("controller", "start")
        testbed.mend()
    monkeypatch.setattr(submit, "submit", checks)
    assert main(["resume", run.id]) == DONE
    assert f"submitted as job {run.launch().slurm_job_id}" in capsys.readouterr().out
