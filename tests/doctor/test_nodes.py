"""What the report of an allocation adds to that of each machine: all nodes together, and their comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.machine import healthy
from trainer.config.shape import LaunchShape
from trainer.core import records
from trainer.core.errors import EnvironmentFault
from trainer.doctor import cluster, examine, node
from trainer.doctor.cluster import compare
from trainer.doctor.examine import Report
from trainer.doctor.finding import Finding, ok
from trainer.runs.records import Reduction
from trainer.slurm.preflight import Together

SHAPE = LaunchShape(nodes=2, processes_per_node=1, device="cpu")
TOGETHER = Together(SHAPE, ["node0", "node1"], "node0", None)
RATES = {"matrix bf16 GPU 0": 700e12, "storage write /runs": 1e9, "cpu memory of 8 threads": 5e10}


def report(host: str, measured: Mapping[str, float] = RATES, **versions: str) -> Report:
    return Report(host=host, status="ok", findings=[ok("fine")], measured=dict(measured), versions=versions)


def nodes(*reports: Report) -> dict[str, Report]:
    return {one.host: one for one in reports}


def compared(*reports: Report) -> list[Finding]:
    return list(compare(nodes(*reports)))


def test_equal_nodes_are_in_order() -> None:
    (found,) = compared(report("node0", torch="2.13"), report("node1", torch="2.13"))
    assert (found.status, found.text) == ("ok", "2 nodes have the same software and about the same speed")
    assert compared(report("node0")) == []


def test_other_software_on_a_node_is_found() -> None:
    (found,) = compared(*(report(f"node{number}", torch="2.12" if number == 1 else "2.13") for number in range(3)))
    assert (found.status, found.text) == ("warning", "torch differs from 2.13: node1: 2.12")
    assert "cluster.exclude" in found.fix
    (found,) = compared(report("node0", NCCL="2.28"), report("node1", NCCL="2.28"), report("node2"))
    assert found.text == "NCCL differs from 2.28: node2: none"


def test_a_slow_node_is_found() -> None:
    slow = {**RATES, "matrix bf16 GPU 0": 500e12}
    (found,) = compared(report("node0"), report("node1", slow))
    assert (found.status, found.text) == ("warning", "node1: matrix bf16 GPU 0 has 71% of the median of the nodes")
    assert found.fix == "see the lines of node1; cluster.exclude=node1 leaves it out"


def test_two_nodes_do_not_show_which_of_them_has_the_slow_disk() -> None:
    slow = report("node0", {**RATES, "storage write /runs": 1e8, "cpu memory of 8 threads": 1e9})
    assert [one.status for one in compared(slow, report("node1"))] == ["ok"]
    assert len([one for one in compared(slow, report("node1"), report("node2")) if one.status == "warning"]) == 2


@pytest.mark.parametrize(
    ("complaint", "text"),
    [("NCCL error 5", "cannot all-reduce: NCCL error 5"), (None, "cannot all-reduce: a rank is missing")],
)
def test_nodes_that_do_not_reach_each_other(complaint: str | None, text: str) -> None:
    together = node._with_reduction(
        report("node0"), Reduction(joined=1, bytes_per_s=None, complaint=complaint), TOGETHER
    )
    found = together.findings[-1]
    assert (together.status, found.check, found.status) == ("error", "all nodes", "error")
    assert text in found.text
    assert "cluster.network_interface" in found.fix


def test_an_all_reduce_that_became_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usual = node._with_reduction(report("node0"), Reduction(joined=1, bytes_per_s=4e9, complaint=None), TOGETHER)
    assert usual.findings[-1].text == "2 ranks on 2 nodes all-reduce at 4 GB/s"
    slow = node._with_reduction(report("node0"), Reduction(joined=1, bytes_per_s=1e9, complaint=None), TOGETHER)
    found = slow.findings[-1]
    assert (found.status, slow.measured["all-reduce over all nodes"]) == ("warning", 1e9)
    assert "cpu all-reduce of 2 on 2 nodes has 25% of the usual" in found.text
    assert "--new-baseline" in found.fix


def test_a_node_without_a_report(tmp_path: Path) -> None:
    (tmp_path / "node0.json").write_text(records.dumps(report("node0")))
    (tmp_path / "slurm-7.log").write_text("slurmstepd: error: node1: no such file\nbye\n")
    examined = cluster._collect("7", ["node0", "node1"], tmp_path, SHAPE)
    (found,) = examined.nodes["node1"].findings
    assert (found.check, found.status) == ("node", "error")
    assert found.text == "no report from this node: slurmstepd: error: node1: no such file | bye"
    assert "runs_dir" in found.fix
    with pytest.raises(EnvironmentFault, match="job 8 ended without a node: the job wrote no log"):
        cluster._collect("8", [], tmp_path, SHAPE)


def test_a_home_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, so that nobody can make a folder of it, not even root")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(examine, "measured", lambda probe: probe)
    found = examine.examine(replace(healthy(tmp_path), is_on_slurm=False), quick=False, new_baseline=False)
    (one,) = [one for one in found.findings if one.check == "baseline"]
    assert (one.status, one.fix) == ("warning", "set XDG_CACHE_HOME to a folder that you may write to")
    assert one.text == "what was measured cannot be kept for comparison: File exists"
    assert found.status == "warning"
