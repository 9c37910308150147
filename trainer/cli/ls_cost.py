"""`trainer ls --cost`: what runs have used and cost, one by one or summed up by user, month or sweep."""

from __future__ import annotations

import json
import os
import pwd
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.cli.common import table
from trainer.core.errors import DONE
from trainer.core.text import one_line
from trainer.runs import bill_text
from trainer.runs.bill import Charge, sound_number

GROUPINGS = ("run", "user", "month", "sweep")
_SOME = " +?"
_MOST_REASONS = 6


@dataclass
class _Sum:
    """What the runs of a group have used; amounts of money by currency."""

    runs: int = 0
    gpu_hours: float = 0.0
    cpu_core_hours: float = 0.0
    energy_kwh: float = 0.0
    co2_kg: float = 0.0
    cost: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("energy_kwh", "cost", "co2_kg"), 0))
    """Number of runs whose energy, cost or CO2 is not known, by key."""

    def add(self, charge: Mapping[str, Any], currency: str | None) -> None:
        self.runs += 1
        self.gpu_hours += charge["gpu_hours"]
        self.cpu_core_hours += charge["cpu_core_hours"]
        for key in self.unknown:
            self.unknown[key] += charge[key] is None
        self.energy_kwh += charge["energy_kwh"] or 0.0
        self.co2_kg += charge["co2_kg"] or 0.0
        if charge["cost"] is not None:
            self.cost[currency or ""] = self.cost.get(currency or "", 0.0) + charge["cost"]

    def is_known(self, key: str) -> bool:
        """Return whether at least one run has a value for this key."""
        return self.unknown[key] < self.runs

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "gpu_hours": round(self.gpu_hours, 6),
            "cpu_core_hours": round(self.cpu_core_hours, 6),
            "energy_kwh": round(self.energy_kwh, 6) if self.is_known("energy_kwh") else None,
            "cost": [
                {"amount": round(amount, 6), "currency": name or None} for name, amount in sorted(self.cost.items())
            ],
            "co2_kg": round(self.co2_kg, 6) if self.is_known("co2_kg") else None,
            "not_known_runs": self.unknown,
        }

    def cells(self) -> list[str]:
        """Return the columns of the table. `+?`: some runs of the group are not in the sum."""
        money = " + ".join(bill_text.money(amount, name or None) for name, amount in sorted(self.cost.items()))
        texts = {
            "energy_kwh": bill_text.energy(self.energy_kwh),
            "cost": money,
            "co2_kg": bill_text.co2(self.co2_kg),
        }
        shown = [
            (text if self.is_known(key) else "-") + (_SOME if 0 < self.unknown[key] < self.runs else "")
            for key, text in texts.items()
        ]
        return [bill_text.hours(Charge(gpu_hours=self.gpu_hours, cpu_core_hours=self.cpu_core_hours)) or "-", *shown]


def show(rows: Sequence[Mapping[str, Any]], by: str, as_json: bool) -> int:
    """Print the bills of runs.

    Args:
        rows: Summaries of the runs.
        by: One of `GROUPINGS`.
        as_json: Print JSON instead of a table.
    """
    rows = [{**row, "bill": _sound(row.get("bill"))} for row in rows]
    groups: dict[str, _Sum] = {}
    for row in rows:
        for name, charge in _CHARGES[by](row):
            groups.setdefault(name, _Sum()).add(charge, row["bill"]["currency"])
    if by == "month":
        groups = dict(sorted(groups.items(), reverse=True))
    if as_json:
        print(json.dumps([{by: name, **total.as_dict()} for name, total in groups.items()], indent=1))
        return DONE
    if not groups:
        print("no run has recorded what it used")
        return DONE
    header = [by.upper(), *([] if by == "run" else ["RUNS"]), "DEVICE-HOURS", "ENERGY", "COST", "CO2"]
    shown = [[name, *([] if by == "run" else [str(total.runs)]), *total.cells()] for name, total in groups.items()]
    if len(groups) > 1:
        shown.append(["total", *([] if by == "run" else [""]), *_total(groups.values()).cells()])
    print(table(shown, header))
    if any(cell.endswith(_SOME) for row in shown for cell in row):
        print(f"{_SOME.strip()}: of some runs it is not known")
    for line in _reasons(rows):
        print(line)
    return DONE


def _total(sums: Iterable[_Sum]) -> _Sum:
    total = _Sum()
    for one in sums:
        total.runs += one.runs
        total.gpu_hours += one.gpu_hours
        total.cpu_core_hours += one.cpu_core_hours
        total.energy_kwh += one.energy_kwh
        total.co2_kg += one.co2_kg
        for currency, amount in one.cost.items():
            total.cost[currency] = total.cost.get(currency, 0.0) + amount
        for key, count in one.unknown.items():
            total.unknown[key] += count
    return total


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why values are not known, each reason once, with the number of runs."""
    counted = Counter(
        (title, one_line(row["bill"]["reasons"].get(key, "not known")))
        for row in rows
        for key, title in (("energy_kwh", "energy"), ("cost", "cost"), ("co2_kg", "CO2"))
        if row["bill"][key] is None
    )
    most = [
        f"{title}: {why} ({runs} run{'s' * (runs > 1)})" for (title, why), runs in counted.most_common(_MOST_REASONS)
    ]
    left = len(counted) - len(most)
    return most + ([f"and {left} more reasons: trainer show RUN"] if left else [])


def _sound(bill: Any) -> dict[str, Any]:
    """Return a bill with all of its keys and types: it may be from a sealed summary, a file of any origin."""
    given = bill if isinstance(bill, dict) else {}
    months, reasons = given.get("by_month"), given.get("reasons")
    return {
        **_charge(given),
        "currency": given["currency"] if isinstance(given.get("currency"), str) else None,
        "by_month": {str(month): _charge(one) for month, one in (months if isinstance(months, dict) else {}).items()},
        "reasons": {key: str(reason) for key, reason in (reasons if isinstance(reasons, dict) else {}).items()},
    }


def _charge(charge: Any) -> dict[str, Any]:
    given = charge if isinstance(charge, dict) else {}
    hours = {key: sound_number(given.get(key)) or 0.0 for key in ("gpu_hours", "cpu_core_hours")}
    return {**hours, **{key: sound_number(given.get(key)) for key in ("energy_kwh", "cost", "co2_kg")}}


def _of_run(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield os.path.basename(row["path"]), row["bill"]


def _of_user(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield _owner(row["path"]), row["bill"]


def _of_month(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from row["bill"]["by_month"].items()


def _of_sweep(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield row.get("sweep") or "(no sweep)", row["bill"]


_CHARGES: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    "run": _of_run,
    "user": _of_user,
    "month": _of_month,
    "sweep": _of_sweep,
}


def _owner(path: str) -> str:
    """Return who owns a run directory."""
    try:
        owner = os.stat(path).st_uid
    except OSError:
        return "?"
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return str(owner)
