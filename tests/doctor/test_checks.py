"""Every check of the doctor, on a machine in order and with each of its faults."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor import gpu_faults, host_faults
from tests.doctor.faults import Fault
from tests.doctor.machine import commands, facts, gpu_facts, healthy
from trainer.core.gpus import TorchBuild
from trainer.doctor import finding as reported
from trainer.doctor.finding import Finding
from trainer.doctor.probe import Probe, Ran
from trainer.doctor.run import CHECKS, run_all

FAULTS = [*gpu_faults.FAULTS, *host_faults.FAULTS]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the settings of this machine's user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def of(check: str, probe: Probe) -> list[Finding]:
    return run_all(probe, checks={check: CHECKS[check]})


@pytest.mark.parametrize("check", CHECKS)
def test_a_machine_in_order_is_ok(check: str, tmp_path: Path) -> None:
    found = of(check, healthy(tmp_path))
    assert [one.status for one in found] == ["ok"] * len(found), found
    assert found


@pytest.mark.parametrize("one", FAULTS, ids=lambda one: f"{one.check}: {one.name}")
def test_a_fault_is_found_and_has_a_remedy(one: Fault, tmp_path: Path) -> None:
    findings = of(one.check, one.machine(tmp_path))
    found = [finding for finding in findings if finding.status == one.status and one.text in finding.text]
    assert found, findings
    assert one.fix in found[0].fix
    assert found[0].check == one.check


@pytest.mark.parametrize(
    "ping",
    [
        Ran(1, "Slurmctld(primary) at head is DOWN\n"),
        Ran(1, "", "scontrol: fatal: Could not establish a configuration source\n"),
        Ran(127, "", "scontrol: not found\n"),
    ],
)
def test_slurms_commands_without_a_cluster_are_no_fault_where_jobs_are_local(ping: Ran, tmp_path: Path) -> None:
    (found,) = of("SLURM", replace(healthy(tmp_path), run=commands(scontrol_ping=ping), environment={}))
    assert found.status == "skipped"
    assert found.text


def test_every_check_has_a_fault() -> None:
    assert {one.check for one in FAULTS} == set(CHECKS)


def test_every_line_that_a_check_can_report_has_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of `warning` and `error` in the source of the checks is made for one of the faults."""
    modules = [sys.modules[name] for name in {check.__module__ for check in CHECKS.values()}]
    made: set[tuple[str, int]] = set()

    def recording(function: Callable[[str, str], Finding]) -> Callable[[str, str], Finding]:
        def record(text: str, fix: str) -> Finding:
            frame = sys._getframe(1)
            made.add((frame.f_code.co_filename, frame.f_lineno))
            return function(text, fix)

        return record

    for module in modules:
        for name in ("warning", "error"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recording(getattr(reported, name)))
    for number, one in enumerate(FAULTS):
        (folder := tmp_path / str(number)).mkdir()
        of(one.check, one.machine(folder))
    written = [(module.__file__, call) for module in modules for call in _reports(Path(str(module.__file__)))]
    assert len(written) > 60
    never = [
        f"{file}:{call.lineno}: {ast.unparse(call)}"
        for file, call in written
        if not any((file, line) in made for line in range(call.lineno, (call.end_lineno or 0) + 1))
    ]
    assert not never


def _reports(path: Path) -> list[ast.Call]:
    """The calls that make a warning or an error; `found` is one of the two."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("warning", "error", "found")]


def test_every_warning_and_error_has_its_fix(tmp_path: Path) -> None:
    for number, one in enumerate(FAULTS):
        (folder := tmp_path / str(number)).mkdir()
        for finding in of(one.check, one.machine(folder)):
            assert finding.fix or finding.status in ("ok", "skipped"), finding


def test_unknown_hardware_is_measured_and_not_judged(tmp_path: Path) -> None:
    unknown = [gpu_facts(index, name="NVIDIA Future 1", matrix_flops={"bf16": 1e12}) for index in (0, 1)]
    found = of("matrix rate", healthy(tmp_path, facts=facts(*unknown)))
    assert [one.status for one in found] == ["ok", "ok"]
    assert "1 TFLOP/s in bf16" in found[0].text
    assert "not in the catalogue" in found[0].text


def test_an_mi300x_is_judged_by_what_it_reaches(tmp_path: Path) -> None:
    """45% of its matrix peak is in order, of an H100 it is not."""
    instinct = [
        gpu_facts(
            index, name="AMD Instinct MI300X", capability="gfx942", matrix_flops={"bf16": rate}, memory_bytes_s=4.3e12
        )
        for index, rate in enumerate((590e12, 300e12))
    ]
    found = of("matrix rate", healthy(tmp_path, facts=facts(*instinct)))
    assert [one.status for one in found] == ["ok", "warning"], found


def test_a_password_in_an_address_is_neither_printed_nor_sent(tmp_path: Path) -> None:
    asked = []
    environment = {"WANDB_BASE_URL": "https://me:hunter2@wandb.site", "WANDB_MODE": "online"}
    probe = healthy(tmp_path, environment=environment, fetch=lambda url, timeout_s: asked.append(url) or "refused")
    (found,) = of("W&B", probe)
    assert asked == ["https://wandb.site"]
    assert "hunter2" not in found.text


def test_a_machine_without_gpus_is_no_fault(tmp_path: Path) -> None:
    probe = healthy(
        tmp_path,
        environment={"WANDB_MODE": "offline"},
        library=None,
        build=TorchBuild("cpu"),
        facts=replace(facts(), devices=[], nccl="", cuda="", reduce_bytes_s=1e9),
        run=commands(scontrol_ping=Ran(127, "")),
    )
    found = run_all(probe)
    assert {one.status for one in found} == {"ok", "skipped"}, [one for one in found if one.fix]
