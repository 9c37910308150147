"""Add up what a run has used: device-hours, energy, money and CO2, by class of the ledger and by month.

The node processes record what each attempt holds and uses (`records.NodeUsage`). Prices and the carbon intensity of the
grid are those of the frozen configuration. What is not measured or not stated is None, with the reason; nothing is
estimated.
"""

from __future__ import annotations

import calendar
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.core.text import one_line
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import CLASSES, AttemptTime, by_attempt
from trainer.runs.records import NodeUsage

PARTS = {"gpu": "GPUs", "cpu": "CPU", "memory": "memory"}
"""Parts of the energy, and their names."""
_JOULES_PER_KWH, _SECONDS_PER_HOUR = 3.6e6, 3600.0
NOT_RECORDED = "no use of devices was recorded: the run was not launched, or by an older release"
_MOST = 1e15
"""Larger numbers of a record are damage: joules of a large cluster in a century."""
_LATEST = 4e9
"""Seconds since 1970 until the year 2096."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a run, or a part of it, has used and cost; None: not known."""

    gpu_hours: float = 0.0
    cpu_core_hours: float = 0.0
    """Of jobs without GPUs only."""
    energy_kwh: float | None = None
    cost: float | None = None
    co2_kg: float | None = None
    """CO2 equivalent of the energy."""

    def as_dict(self) -> dict[str, float | None]:
        """Return the values, rounded for a reader."""
        return {name: None if value is None else round(value, 6) for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a run has used and cost."""

    total: Charge
    currency: str | None = None
    parts_kwh: Mapping[str, float] = field(default_factory=dict)
    """Measured energy by part: gpu, cpu, memory."""
    measured: float | None = None
    """The share of the device-hours whose devices have an energy counter."""
    by_class: Mapping[str, Charge] = field(default_factory=dict)
    """By class of the ledger; the classes that held no device are left out."""
    by_month: Mapping[str, Charge] = field(default_factory=dict)
    """By month (UTC), such as 2026-11."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why a value is None or incomplete: key (energy_kwh, cost, co2_kg, or a part) to a sentence."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            **self.total.as_dict(),
            "currency": self.currency,
            "parts_kwh": {part: round(kwh, 6) for part, kwh in self.parts_kwh.items()},
            "energy_measured": None if self.measured is None else round(self.measured, 4),
            "by_class": {name: charge.as_dict() for name, charge in self.by_class.items()},
            "by_month": {month: charge.as_dict() for month, charge in self.by_month.items()},
            "reasons": dict(self.reasons),
        }


@dataclass(frozen=True)
class Prices:
    """The values of the section `cluster` that a bill uses; None: not stated, or unusable in a damaged file."""

    gpu_hour: float | None
    cpu_core_hour: float | None
    gco2_per_kwh: float | None
    currency: str | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Prices:
        """Read the prices of a frozen configuration."""
        cluster = config.get("cluster")
        cluster = cluster if isinstance(cluster, Mapping) else {}
        keys = ("price_per_gpu_hour", "price_per_cpu_core_hour", "grid_gco2_per_kwh")
        gpu_hour, core_hour, intensity = (sound_number(cluster.get(key)) for key in keys)
        currency = cluster.get("currency")
        named = one_line(currency)[:16] if isinstance(currency, str) and currency else None
        return cls(gpu_hour, core_hour, intensity, named)


def bill(run: RunDirectory, config: Mapping[str, Any] | None = None) -> Bill:
    """Return the bill of a run; of an active one that of the time until the last reading.

    Args:
        run: The run.
        config: Its frozen configuration; None: read it.
    """
    prices = Prices.of(run.config() if config is None else config)
    usages = [usage for usage in run.usage() if _is_sound(usage)]
    if not usages:
        unknown = dict.fromkeys(("energy_kwh", "cost", "co2_kg"), NOT_RECORDED)
        return Bill(total=Charge(), currency=prices.currency, reasons=unknown)
    times = {attempt.attempt: attempt for attempt in by_attempt(run, run.events())}
    first, last = (choose(usage.attempt for usage in usages) for choose in (min, max))
    total, by_class = _Use(), {name: _Use() for name in CLASSES}
    by_month: dict[str, _Use] = {}
    for usage in usages:
        total.add(usage)
        before = "start" if usage.attempt == first else "down"
        after = "finish" if usage.attempt == last else "down"
        for name, part in _classes(usage, times.get(usage.attempt), before, after).items():
            by_class[name].add_part(usage, part)
        for month, share in _months(usage.began, usage.seconds):
            by_month.setdefault(month, _Use()).add(usage, share)
    return Bill(
        total=total.charge(prices),
        currency=prices.currency,
        parts_kwh={part: joules / _JOULES_PER_KWH for part, joules in total.joules.items()},
        measured=total.measured,
        by_class={name: use.charge(prices) for name, use in by_class.items() if use.device_s},
        by_month={month: use.charge(prices) for month, use in sorted(by_month.items())},
        reasons=_reasons(total, prices, usages),
    )


def in_summary(run: RunDirectory) -> dict[str, float]:
    """Return what trackers put into their summary: the known sums of the bill under names that begin with `bill/`."""
    try:
        total = bill(run).total
    except Exception as error:  # a damaged file must not end a training
        print(f"the bill is not known: {type(error).__name__}: {error}", flush=True)
        return {}
    return {f"bill/{name}": value for name, value in total.as_dict().items() if value}


@dataclass
class _Use:
    """What is added up."""

    gpu_s: float = 0.0
    core_s: float = 0.0
    measured_s: float = 0.0
    joules: dict[str, float] = field(default_factory=dict)

    @property
    def device_s(self) -> float:
        return self.gpu_s + self.core_s

    @property
    def measured(self) -> float | None:
        return self.measured_s / self.device_s if self.device_s else None

    def add(self, usage: NodeUsage, share: float = 1.0) -> None:
        """Add a share of a record."""
        joules = {part: sum(phases.values()) * share for part, phases in usage.joules.items()}
        self.add_part(usage, _Part(usage.seconds * share, joules))

    def add_part(self, usage: NodeUsage, part: _Part) -> None:
        """Add a part of a record."""
        if usage.device == "gpu":
            self.gpu_s += part.seconds * usage.devices
        else:
            self.core_s += part.seconds * usage.devices
        self.measured_s += part.seconds * min(usage.measured, usage.devices)
        for name, joules in part.joules.items():
            self.joules[name] = self.joules.get(name, 0.0) + joules

    def charge(self, prices: Prices) -> Charge:
        """Return it in the units of a bill."""
        kwh = sum(self.joules.values()) / _JOULES_PER_KWH if self.measured_s else None
        gpu_hours, core_hours = self.gpu_s / _SECONDS_PER_HOUR, self.core_s / _SECONDS_PER_HOUR
        costs = [
            None if price is None else hours * price
            for hours, price in ((gpu_hours, prices.gpu_hour), (core_hours, prices.cpu_core_hour))
            if hours
        ]
        intensity = prices.gco2_per_kwh
        return Charge(
            gpu_hours=gpu_hours,
            cpu_core_hours=core_hours,
            energy_kwh=kwh,
            cost=sum(cost for cost in costs if cost is not None) if costs and None not in costs else None,
            co2_kg=None if kwh is None or intensity is None else kwh * intensity / 1000,
        )


@dataclass
class _Part:
    seconds: float
    joules: dict[str, float]


def _classes(usage: NodeUsage, attempt: AttemptTime | None, before: str, after: str) -> dict[str, _Part]:
    """Return what a record holds by class of the ledger; its seconds add up to those of the record.

    Args:
        usage: The record.
        attempt: The time of its attempt by the first rank; None: it ended before its first heartbeat.
        before: The class of the time before the first rank. As in the ledger, that between two attempts is `down`.
        after: The class of the time after it.
    """
    if attempt is None:
        return {before: _Part(usage.seconds, {part: sum(phases.values()) for part, phases in usage.joules.items()})}
    gap_s = min(max(0.0, attempt.began - usage.began), usage.seconds)
    spent = {phase: seconds for phase, seconds in attempt.spent.items() if sound_number(seconds) is not None}
    tail_s = max(0.0, usage.seconds - gap_s - sum(spent.values()))
    started_s = spent.get("start", 0.0)
    total = gap_s + sum(spent.values()) + tail_s
    # Seconds of the clock of one rank, on each node scaled to what the node has held.
    scale = usage.seconds / total if total else 0.0
    classes: dict[str, _Part] = {}
    for name, seconds in [(before, gap_s), (after, tail_s), *attempt.by_class(spent).items()]:
        classes.setdefault(name, _Part(0.0, {})).seconds += seconds * scale
    for part, joules in usage.joules.items():
        by_phase = dict(joules)
        early = by_phase.get("start", 0.0) * (gap_s / (gap_s + started_s) if gap_s else 0.0)
        if early:
            by_phase["start"] -= early
        for name, amount in [(before, early), *attempt.by_class(by_phase).items()]:
            mine = classes.setdefault(name, _Part(0.0, {})).joules
            mine[part] = mine.get(part, 0.0) + amount
    return classes


def _months(began: float, seconds: float) -> Iterator[tuple[str, float]]:
    """Yield the months (UTC) of a stretch of time, each with its share."""
    end = began + seconds
    while True:
        year, month = time.gmtime(began)[:2]
        following = _first_of_month(year + month // 12, month % 12 + 1)
        yield f"{year:04d}-{month:02d}", (min(end, following) - began) / seconds if seconds else 1.0
        if following >= end:
            return
        began = following


def _first_of_month(year: int, month: int) -> int:
    return calendar.timegm((year, month, 1, 0, 0, 0, 0, 1, 0))


def _reasons(total: _Use, prices: Prices, usages: Iterable[NodeUsage]) -> dict[str, str]:
    missing = {part: reason for usage in usages for part, reason in usage.missing.items()}
    reasons = {f"{part}_energy": one_line(reason) for part, reason in sorted(missing.items()) if part in PARTS}
    device = "gpu" if total.gpu_s else "cpu"
    why = one_line(missing.get(device, "no counter was read"))
    if not total.measured_s:
        reasons["energy_kwh"] = f"not measured: {why}"
        reasons["co2_kg"] = "the energy is not measured"
    else:
        if (total.measured or 0.0) < 0.999:
            reasons["energy_kwh"] = f"measured for {total.measured:.0%} of the device-hours: {why}"
        if prices.gco2_per_kwh is None:
            reasons["co2_kg"] = "cluster.grid_gco2_per_kwh is not set"
    unpriced = [
        key
        for held_s, price, key in (
            (total.gpu_s, prices.gpu_hour, "price_per_gpu_hour"),
            (total.core_s, prices.cpu_core_hour, "price_per_cpu_core_hour"),
        )
        if held_s and price is None
    ]
    if unpriced:
        reasons["cost"] = f"cluster.{unpriced[0]} is not set"
    return reasons


def _is_sound(usage: NodeUsage) -> bool:
    """Return whether a record has no number that only damage can give it."""
    numbers = [usage.began, usage.seconds, usage.devices, usage.measured]
    numbers += [joules for phases in usage.joules.values() for joules in phases.values()]
    return all(sound_number(number) is not None for number in numbers) and max(usage.began, usage.seconds) < _LATEST


def sound_number(value: Any) -> float | None:
    """Return a value of a file that is a finite number of at least 0; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < _MOST and math.isfinite(value) else None
