"""What of a job on SLURM is decided without asking SLURM: values of options, the judgement of a preflight."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.config.shape import LaunchShape
from trainer.core import records
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Launch, NodeCheck, Reduction
from trainer.slurm import preflight
from trainer.slurm.options import check_values


@pytest.mark.parametrize("value", ["ib0", "enp65s0f0.100", "bond0"])
def test_the_name_of_an_interface_is_accepted(value: str) -> None:
    assert list(check_values({"network_interface": value, "save_before_end_s": 180})) == []


@pytest.mark.parametrize("value", ["ib0,ib1", "^docker0", "=eth0", "ib 0", "ib0\nexport X=1", "a" * 16])
def test_what_gloo_or_bash_would_misread_is_refused(value: str) -> None:
    (problem,) = check_values({"network_interface": value, "save_before_end_s": 180})
    assert "cluster.network_interface" in problem.message
    assert "ib0" in problem.fix


def test_the_time_limit_of_the_preflight_is_at_least_half_a_minute() -> None:
    (problem,) = check_values({"preflight_timeout_s": 10, "save_before_end_s": 180})
    assert problem.message == "cluster.preflight_timeout_s=10: must be at least 30"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    run = RunDirectory(tmp_path / "run-abcdefgh")
    run.path.mkdir()
    run.config_path.write_text(yaml.safe_dump({"cluster": {"name": "slurm"}}))
    run.write_launch(Launch(shape=LaunchShape(nodes=2, processes_per_node=1, device="cpu")))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    preflight.folder(run).mkdir(parents=True)
    return run


def write(run: RunDirectory, node: str, *problems: str, reduced: Reduction | None = None) -> None:
    check = NodeCheck(node=node, problems=list(problems), code="1", data={}, reduced=reduced)
    (preflight.folder(run) / f"{node}.json").write_text(records.dumps(check))


def test_a_node_that_was_cut_off_while_its_ranks_joined_is_unfit(run: RunDirectory) -> None:
    """Its own checks are written before its ranks start, so that the others need not wait for an unfit one."""
    write(run, "n0", reduced=Reduction(joined=1, bytes_per_s=1e9, complaint=None))
    write(run, "n1")
    assert preflight.judge(run, ["n0", "n1"]) == ({"n1": "no response from its ranks"}, None)
    write(run, "n1", reduced=Reduction(joined=1, bytes_per_s=2e9, complaint=None))
    assert preflight.judge(run, ["n0", "n1"]) == ({}, 1e9)


def test_an_unfit_node_ends_the_wait_of_the_others(run: RunDirectory) -> None:
    write(run, "n1", "0 GPUs are usable, 1 are needed")
    reduced = preflight.reduce_together(run, run.shape(), ["n1", "n0"], "n0", timeout_s=60.0)
    assert reduced.joined == 0
    assert "ended before node 0" in str(reduced.complaint)
    write(run, "n0", reduced=reduced)
    assert preflight.judge(run, ["n0", "n1"])[0] == {"n1": "0 GPUs are usable, 1 are needed"}


def test_a_node_that_got_slower_is_named_and_used(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    together = preflight.Together(run.shape(), ["n0", "n1"], "n0", None)
    rate = "cpu matrix fp32 of rank 0"
    usual = Reduction(joined=1, bytes_per_s=1e9, complaint=None, rates={rate: 1e11})
    assert preflight.slower(usual, together) == [], "nothing to compare with"
    now = Reduction(joined=1, bytes_per_s=0.9e9, complaint=None, rates={rate: 1e10})
    assert preflight.slower(now, together) == [f"{rate} has 10% of the usual"]
    slow = NodeCheck(node="n0", problems=[], code="1", data={}, reduced=now, slow=preflight.slower(now, together))
    (preflight.folder(run) / "n0.json").write_text(records.dumps(slow))
    write(run, "n1", reduced=usual)
    assert preflight.judge(run, ["n0", "n1"]) == ({}, 0.9e9)
    assert preflight.slow(run, ["n0", "n1"]) == {"n0": [f"{rate} has 10% of the usual"]}
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert preflight.slower(now, together) == [], "a node without a home can be used"
