"""The bill of a run: what its nodes have recorded, added up by class, month and run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trainer.core.records import dumps
from trainer.runs import bill_text
from trainer.runs.bill import NOT_RECORDED, Bill, Charge, bill
from trainer.runs.directory import RunDirectory
from trainer.runs.records import HeartbeatRecord, NodeUsage

NOVEMBER_ENDS = 1_796_083_200.0
"""2026-12-01 00:00 UTC."""
PRICES = {"price_per_gpu_hour": 2.0, "price_per_cpu_core_hour": 0.05, "currency": "EUR", "grid_gco2_per_kwh": 400}


def usage(attempt: int = 0, node: int = 0, **fields: Any) -> NodeUsage:
    values = {
        "device": "gpu",
        "devices": 4,
        "measured": 4,
        "began": NOVEMBER_ENDS - 7200,
        "seconds": 3600.0,
        "joules": {"gpu": {"start": 0.36e6, "train": 3.24e6}},
    }
    return NodeUsage(attempt=attempt, node=node, **{**values, **fields})


def made(tmp_path: Path, *usages: NodeUsage) -> RunDirectory:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    run.live_dir.mkdir(parents=True)
    for one in usages:
        run.write_usage(one)
    return run


def billed(run: RunDirectory, **cluster: Any) -> Bill:
    return bill(run, {"cluster": {**PRICES, **cluster}})


def beat(run: RunDirectory, name: str, attempt: int, began: float, **fields: Any) -> None:
    (run.live_dir / name).write_text(dumps(HeartbeatRecord(attempt=attempt, began=began, phase="train", **fields)))


def test_nodes_and_attempts_add_up(tmp_path: Path) -> None:
    run = made(tmp_path, usage(), usage(node=1), usage(attempt=1, devices=2, measured=2))
    found = billed(run)
    assert found.total == Charge(
        gpu_hours=10.0, energy_kwh=pytest.approx(3.0), cost=20.0, co2_kg=pytest.approx(1.2), cpu_core_hours=0.0
    )
    assert (found.currency, found.measured, found.reasons) == ("EUR", 1.0, {})


def test_each_class_has_its_part_of_the_time_the_energy_and_the_money(tmp_path: Path) -> None:
    began = NOVEMBER_ENDS - 7200
    run = made(tmp_path, usage(), usage(attempt=1, began=began + 9000, joules={"gpu": {"start": 60.0, "train": 540.0}}))
    # 400 s before the first rank, 200 s to join; 2,900 s of training; 100 s until the next one.
    beat(run, "attempt-00-rank-0.json", 0, began + 400, spent={"start": 200.0, "train": 2900.0}, step=100)
    # A quarter of the steps were done before.
    beat(run, "rank-0.json", 1, began + 9100, spent={"start": 500.0, "train": 3000.0}, first_step=80, step=160)
    found = billed(run)
    hours = {name: charge.gpu_hours for name, charge in found.by_class.items()}
    assert hours == pytest.approx(
        {
            "start": 4 * (600 + 500) / 3600,
            "train": 4 * (2900 + 2250) / 3600,
            "redone": 4 * 750 / 3600,
            "down": 4 * (100 + 100) / 3600,
        }
    )
    kwh = {name: charge.energy_kwh for name, charge in found.by_class.items()}
    assert kwh["train"] == pytest.approx((3.24e6 + 540 * 0.75) / 3.6e6)
    assert kwh["down"] == pytest.approx(60 * (100 / 600) / 3.6e6)
    for key in ("gpu_hours", "energy_kwh", "cost", "co2_kg"):
        parts = [getattr(charge, key) for charge in found.by_class.values()]
        assert sum(parts) == pytest.approx(getattr(found.total, key)), key


def test_a_run_over_a_change_of_month_is_divided(tmp_path: Path) -> None:
    found = billed(made(tmp_path, usage(began=NOVEMBER_ENDS - 900)))
    assert {month: charge.gpu_hours for month, charge in found.by_month.items()} == {"2026-11": 1.0, "2026-12": 3.0}
    assert found.by_month["2026-12"].cost == 6.0
    long = billed(made(tmp_path / "long", usage(began=NOVEMBER_ENDS - 1, seconds=86400.0 * 62 + 1)))
    assert list(long.by_month) == ["2026-11", "2026-12", "2027-01"]
    assert sum(charge.cost or 0 for charge in long.by_month.values()) == pytest.approx(long.total.cost)


def test_what_is_not_known_has_a_reason(tmp_path: Path) -> None:
    silent = usage(measured=0, joules={}, missing={"gpu": "GPU 0: Tesla P100 has no energy counter"})
    found = bill(made(tmp_path, silent), {"cluster": {}})
    assert (found.total.energy_kwh, found.total.cost, found.total.co2_kg) == (None, None, None)
    assert found.reasons == {
        "gpu_energy": "GPU 0: Tesla P100 has no energy counter",
        "energy_kwh": "not measured: GPU 0: Tesla P100 has no energy counter",
        "co2_kg": "the energy is not measured",
        "cost": "cluster.price_per_gpu_hour is not set",
    }
    assert bill_text.sheet(found) == [
        "4 GPU hours",
        "start 100%",
        "energy not measured: GPU 0: Tesla P100 has no energy counter",
        "no cost: cluster.price_per_gpu_hour is not set",
    ]
    never = bill(made(tmp_path / "never"), {"cluster": PRICES})
    assert never.total == Charge()
    assert set(never.reasons.values()) == {NOT_RECORDED}
    assert bill_text.sheet(never) == []


def test_gpus_without_a_counter_are_told_from_a_cpu_without_one(tmp_path: Path) -> None:
    denied = {"cpu": "/sys/class/powercap/intel-rapl:0/energy_uj: Permission denied"}
    found = billed(made(tmp_path, usage(missing=denied), usage(node=1, measured=0, joules={}, missing={"gpu": "lost"})))
    assert found.measured == 0.5
    assert found.total.energy_kwh == pytest.approx(1.0)
    assert found.reasons["energy_kwh"] == "measured for 50% of the device-hours: lost"
    assert found.reasons["cpu_energy"].endswith("Permission denied")
    # The energy of the CPU alone is not that of a job on GPUs.
    only_cpu = billed(made(tmp_path / "cpu", usage(measured=0, joules={"cpu": {"train": 3.6e6}})))
    assert only_cpu.total.energy_kwh is None
    assert only_cpu.parts_kwh == {"cpu": 1.0}


@pytest.mark.parametrize("damage", [-1.0, math.nan, math.inf, 1e300, "4", None])
@pytest.mark.parametrize("field", ["began", "seconds", "devices"])
def test_damaged_numbers_are_left_out(field: str, damage: Any, tmp_path: Path) -> None:
    run = made(tmp_path, usage(), usage(node=1))
    path = run.usage_dir / "attempt-00-node-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: damage}))
    (run.usage_dir / "attempt-00-node-2.json").write_text("{")
    (run.usage_dir / "attempt-x-node-2.json").write_text("")
    assert billed(run).total.gpu_hours == 4.0


@pytest.mark.parametrize("price", [-1, math.nan, math.inf, "2", [2], True])
def test_prices_of_a_damaged_configuration_are_not_used(price: Any, tmp_path: Path) -> None:
    assert billed(made(tmp_path, usage()), price_per_gpu_hour=price).total.cost is None
    assert bill(made(tmp_path / "b", usage()), {"cluster": None}).total.cost is None


def test_the_words_of_a_large_bill(tmp_path: Path) -> None:
    joules = {"gpu": {"train": 3.6e9}, "cpu": {"train": 3.6e8}}
    found = billed(made(tmp_path, usage(seconds=3.6e6, joules=joules)))
    assert bill_text.sheet(found) == [
        "4,000 GPU hours; 1,100 kWh (GPUs 1,000 kWh, CPU 100 kWh); 8,000.00 EUR; 440 kg CO2e",
        "start 100% 8,000.00 EUR",
    ]
    small = billed(made(tmp_path / "s", usage(devices=1, measured=1, seconds=3.6, joules={"gpu": {"train": 36.0}})))
    assert bill_text.sheet(small)[0] == "0.001 GPU hours; 0.01 Wh; <0.01 EUR; 0.004 g CO2e"
