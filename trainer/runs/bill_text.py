"""The bill of a run in words, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.runs.bill import PARTS, Bill, Charge


def hours(charge: Charge) -> str:
    """Return the device-hours: `3.21 GPU hours`, `0.5 CPU core hours`, or both."""
    parts = [
        f"{_quantity(value)} {name} hours"
        for value, name in ((charge.gpu_hours, "GPU"), (charge.cpu_core_hours, "CPU core"))
        if value
    ]
    return " and ".join(parts)


def energy(kwh: float | None) -> str:
    """Return an energy in kWh or Wh; `not measured` for None."""
    return "not measured" if kwh is None else _scaled(kwh, "kWh", "Wh")


def money(amount: float | None, currency: str | None) -> str:
    """Return an amount of money; `not known` for None."""
    if amount is None:
        return "not known"
    text = f"{amount:,.2f}" if amount >= 0.01 or amount == 0 else "<0.01"
    return f"{text} {currency}" if currency else text


def co2(kg: float | None) -> str:
    """Return a mass of CO2 equivalent; `not known` for None."""
    return "not known" if kg is None else f"{_scaled(kg, 'kg', 'g')} CO2e"


def parts(parts_kwh: Mapping[str, float]) -> str:
    """Return the energy by part: `GPUs 1.6 kWh, CPU 240 Wh`."""
    return ", ".join(f"{name} {energy(parts_kwh[part])}" for part, name in PARTS.items() if parts_kwh.get(part))


def sheet(bill: Bill) -> list[str]:
    """Return the lines of `trainer show`: the sum, what each class of the ledger had of it, and what is not known."""
    total, why = bill.total, bill.reasons
    if not hours(total):
        return []
    known = [hours(total)]
    if total.energy_kwh is not None:
        known.append(_with_parts(total.energy_kwh, bill.parts_kwh))
    if total.cost is not None:
        known.append(money(total.cost, bill.currency))
    if total.co2_kg is not None:
        known.append(co2(total.co2_kg))
    unknown = [f"energy {why['energy_kwh']}"] if "energy_kwh" in why else []
    if total.energy_kwh is not None and total.co2_kg is None:
        unknown.append(f"no CO2: {why['co2_kg']}")
    if total.cost is None:
        unknown.append(f"no cost: {why['cost']}")
    return ["; ".join(known), *([by_class(bill)] if bill.by_class else []), *unknown]


def by_class(bill: Bill) -> str:
    """Return what each class of at least 0.5% had of the cost, else of the energy, and its share."""
    total = bill.total
    amounts = {name: _amount(bill, charge) for name, charge in bill.by_class.items()}
    whole = sum(amounts.values()) or 1.0
    texts = []
    for name, amount in amounts.items():
        if amount / whole < 0.005:
            continue
        text = f"{name.replace('_', ' ')} {amount / whole:.0%}"
        if total.cost and total.cost >= 1:
            text += f" {money(amount, bill.currency)}"
        texts.append(text)
    return ", ".join(texts)


def _amount(bill: Bill, charge: Charge) -> float:
    """Return the cost, else the energy, else the device-hours of a class."""
    if bill.total.cost:
        return charge.cost or 0.0
    if bill.total.energy_kwh:
        return charge.energy_kwh or 0.0
    return charge.gpu_hours + charge.cpu_core_hours


def _with_parts(kwh: float, parts_kwh: Mapping[str, float]) -> str:
    named = parts(parts_kwh)
    return f"{energy(kwh)} ({named})" if "," in named else energy(kwh)


def _quantity(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 else "0" if value < 5e-7 else f"{value:.6f}"


def _scaled(value: float, unit: str, small_unit: str) -> str:
    return f"{_quantity(value)} {unit}" if value >= 1 else f"{_quantity(value * 1000)} {small_unit}"
