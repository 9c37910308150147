"""The section on time, energy and money: where every second of the run and of its devices went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.core.units import three_digits
from trainer.report import words
from trainer.report.facts import Facts
from trainer.report.markup import Markup, element, note, section, table, void
from trainer.runs import bill_text
from trainer.runs.bill import PARTS, Charge

_WIDTH, _HEIGHT = 920, 34
_LEAST = 0.004
"""Shares that are too small to be seen are not drawn."""
_MEANINGS = {
    "queue": "waiting for SLURM",
    "start": "until the ranks have joined",
    "import": "importing packages",
    "build": "model, data and checkpoint",
    "first_step": "first step, with compilation",
    "train": "useful steps",
    "data": "waiting for batches",
    "redone": "steps done again after a fault",
    "validate": "validation",
    "save": "training blocked by checkpoints",
    "finish": "last checkpoint, trackers",
    "hang": "hangs until they were detected",
    "down": "between two attempts",
}


def account(facts: Facts) -> Markup:
    """Return the time ledger with the devices, the energy and the money of each class, and what is not known."""
    ledger, bill = facts.ledger, facts.bill
    if ledger is None and not bill_text.hours(bill.total):
        return Markup("")
    seconds: Mapping[str, float] = ledger["seconds"] if ledger else {}
    wall_s = ledger["wall_s"] if ledger else 0.0
    rows: list[Sequence[object]] = [
        _row(name, seconds.get(name, 0.0), wall_s, bill.by_class.get(name))
        for name in _MEANINGS
        if seconds.get(name, 0.0) >= 0.0005 or name in bill.by_class
    ]
    whole = [element("b", cell) for cell in _row("total", wall_s, wall_s, bill.total)[1:]]
    rows.append(("", element("b", "total"), *whole[1:]))
    header: Sequence[str] = ("", "class", "time", "share", "device-hours", "energy", "cost")
    if not bill_text.hours(bill.total):  # of an older release: nothing but the time is known
        header, rows = header[:4], [row[:4] for row in rows]
    sentence = ""
    if ledger:
        sentence = (
            f"Of {words.span(wall_s)}, {words.percent(ledger['effective'])} were useful steps; without the queue "
            f"{words.percent(ledger['goodput'])} (goodput)."
        )
    return section(
        "Time, energy and cost",
        element("p", sentence) if sentence else "",
        _bar(seconds, wall_s) if wall_s else "",
        table(header, rows, numbers=(2, 3, 4, 5, 6)),
        _remarks(facts),
    )


def plan(facts: Facts) -> Markup:
    """Return what the plan at the launch expected, beside what was measured; empty without a plan."""
    if not facts.plan:
        return Markup("")
    header = ("", "planned", "measured", "difference")
    remark = "The plan knows of training steps only: no validation, no saving, no starts."
    return section("Plan and run", table(header, [one.cells() for one in facts.plan], numbers=(1, 2, 3)), note(remark))


def _row(name: str, seconds: float, wall_s: float, charge: Charge | None) -> tuple[object, ...]:
    used = charge or Charge()
    hours = used.gpu_hours + used.cpu_core_hours
    key = element("span", class_=f"key c-{name.replace('_', '-')}") if name in _MEANINGS else ""
    what = element("span", name.replace("_", " "), element("small", _MEANINGS.get(name, "")))
    return (
        key,
        what,
        words.span(seconds) if seconds or not charge else "-",
        words.percent(seconds / wall_s) if wall_s else "-",
        _hours(hours),
        bill_text.energy(used.energy_kwh) if used.energy_kwh is not None else "-",
        bill_text.money(used.cost, None) if used.cost is not None else "-",
    )


def _hours(hours: float) -> str:
    if not hours:
        return "-"
    return "<0.001" if hours < 0.001 else three_digits(hours)


def _bar(seconds: Mapping[str, float], wall_s: float) -> Markup:
    """Return the shares of the classes side by side, in the order of the table."""
    parts, at = [], 0.0
    words_ = []
    for name in _MEANINGS:
        share = seconds.get(name, 0.0) / wall_s
        if share < _LEAST:
            continue
        wide = share * _WIDTH
        class_ = f"c-{name.replace('_', '-')}"
        parts.append(
            void("rect", class_=class_, x=f"{at:.1f}", y=0, width=f"{max(wide - 1.5, 1):.1f}", height=_HEIGHT, rx=2)
        )
        words_.append(f"{name.replace('_', ' ')} {share:.0%}")
        at += wide
    label = f"Time by class: {', '.join(words_)}."
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
        class_="bar",
        preserveAspectRatio="none",
    )


def _remarks(facts: Facts) -> Markup:
    """Return what the figures are, and why some are not known."""
    bill = facts.bill
    remarks = []
    if bill.total.energy_kwh is not None:
        parts = bill_text.parts(bill.parts_kwh)
        remarks.append(f"Energy from the counters of the hardware: {parts}." if parts else "")
        missing = [PARTS[part] for part in PARTS if f"{part}_energy" in bill.reasons]
        if missing:
            remarks.append(f"Not measured: {', '.join(missing)}.")
    if bill.total.co2_kg is not None:
        intensity = facts.option("cluster", "grid_gco2_per_kwh")
        remarks.append(f"{bill_text.co2(bill.total.co2_kg)} at {intensity:g} g per kWh." if intensity else "")
    if bill.total.cost is not None:
        for key, unit in (("price_per_gpu_hour", "GPU hour"), ("price_per_cpu_core_hour", "CPU core hour")):
            price = facts.option("cluster", key)
            used = bill.total.gpu_hours if key == "price_per_gpu_hour" else bill.total.cpu_core_hours
            if isinstance(price, (int, float)) and used:
                remarks.append(f"Cost in {bill.currency or 'the unit of the price'}: {price:g} per {unit}.")
    unknown: dict[str, list[str]] = {}
    for key, what in (("energy_kwh", "energy"), ("cost", "cost"), ("co2_kg", "CO2")):
        if key in bill.reasons:
            unknown.setdefault(bill.reasons[key], []).append(what)
    for reason, names in unknown.items():
        listed = ", ".join(names)
        remarks.append(f"{listed[:1].upper()}{listed[1:]}: {reason}.")
    return note(" ".join(filter(None, remarks)))
