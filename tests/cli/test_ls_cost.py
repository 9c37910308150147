"""`trainer ls --cost`: bills of several runs, one by one and summed up."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs.test_bill import NOVEMBER_ENDS, PRICES, usage
from trainer.cli import ls_cost
from trainer.cli.ls import main
from trainer.runs.bill import NOT_RECORDED
from trainer.runs.directory import RunDirectory


def make(name: str, *usages: Any, sweep: str = "", **cluster: Any) -> None:
    run = RunDirectory(Path("runs") / name)
    run.path.mkdir(parents=True)
    run.config_path.write_text(yaml.safe_dump({"cluster": {**PRICES, **cluster}}))
    run.manifest_path.write_text(json.dumps({"sweep": {"name": sweep}} if sweep else {}))
    for one in usages:
        run.write_usage(one)


@pytest.fixture
def runs(workdir: Path) -> None:
    make("small-aaaaaaaa", usage(), sweep="lr-cccccccc")
    make("over-bbbbbbbb", usage(began=NOVEMBER_ENDS - 1800), currency="USD")
    make("bare-cccccccc", usage(measured=0, joules={}, devices=8), price_per_gpu_hour=None)
    make("cpu-dddddddd", usage(device="cpu", devices=100, measured=100, joules={"cpu": {"train": 3.6e5}}))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("runs")
def test_each_run_has_a_row_and_the_last_row_is_the_total(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = [line.split("  ") for line in printed(capsys, "--cost").splitlines()]
    table = {line[0]: [cell.strip() for cell in line[1:] if cell] for line in lines}
    assert table["RUN"] == ["DEVICE-HOURS", "ENERGY", "COST", "CO2"]
    assert table["small-aaaaaaaa"] == ["4 GPU hours", "1 kWh", "8.00 EUR", "400 g CO2e"]
    assert table["bare-cccccccc"] == ["8 GPU hours", "-", "-", "-"]
    assert table["cpu-dddddddd"] == ["100 CPU core hours", "100 Wh", "5.00 EUR", "40 g CO2e"]
    # Amounts of different currencies are not added, and what is not known is not taken for 0.
    assert table["total"] == [
        "16 GPU hours and 100 CPU core hours",
        "2.1 kWh +?",
        "13.00 EUR + 8.00 USD +?",
        "840 g CO2e +?",
    ]
    assert [line for (line,) in lines[-4:]] == [
        "+?: of some runs it is not known",
        "energy: not measured: no counter was read (1 run)",
        "cost: cluster.price_per_gpu_hour is not set (1 run)",
        "CO2: the energy is not measured (1 run)",
    ]


@pytest.mark.usefixtures("runs")
def test_runs_are_summed_up_by_month_user_and_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    by_month = json.loads(printed(capsys, "--by", "month", "--json"))
    assert [(row["month"], row["runs"], row["gpu_hours"]) for row in by_month] == [
        ("2026-12", 1, 2.0),
        ("2026-11", 4, 14.0),
    ]
    (by_user,) = json.loads(printed(capsys, "--by", "user", "--json"))
    assert by_user["user"] == pwd.getpwuid(os.getuid()).pw_name
    assert by_user["cost"] == [{"amount": 13.0, "currency": "EUR"}, {"amount": 8.0, "currency": "USD"}]
    assert by_user["not_known_runs"] == {"energy_kwh": 1, "cost": 1, "co2_kg": 1}
    by_sweep = json.loads(printed(capsys, "--by", "sweep", "--json"))
    assert {row["sweep"]: row["runs"] for row in by_sweep} == {"lr-cccccccc": 1, "(no sweep)": 3}


def test_runs_without_a_record_are_not_free(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("old-aaaaaaaa")
    lines = printed(capsys, "--cost").splitlines()
    assert lines[1].split() == ["old-aaaaaaaa", "-", "-", "-", "-"]
    assert lines[2] == f"energy: {NOT_RECORDED} (1 run)"
    assert printed(capsys, "--by", "month").strip() == "no run has recorded what it used"


def test_a_damaged_summary_is_not_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    bills: list[Any] = [None, [], {"gpu_hours": "x", "cost": -1, "by_month": [1], "reasons": 5, "currency": {}}]
    bills.append(
        {"gpu_hours": 1, "cost": float("nan"), "by_month": {"2026-11": None}, "reasons": {"cost": ["\x1b[2J"]}}
    )
    for by in ls_cost.GROUPINGS:
        rows = [{"path": "runs/a", "bill": bill, "sweep": None} for bill in bills]
        assert ls_cost.show(rows, by, False) == 0
    assert "\x1b" not in capsys.readouterr().out
