"""The report of several runs: what came out, the curves over each other, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.core.errors import TrainerError
from trainer.report import chart, sections, words
from trainer.report.chart import Line
from trainer.report.defaults import shown
from trainer.report.facts import Facts
from trainer.report.markup import Markup, element, join, note, section, table
from trainer.runs import bill_text
from trainer.runs.comparison import Section, compare
from trainer.runs.curves import is_measured_time

MOST_RUNS = 24
"""More lines in a chart cannot be told apart."""
_MOST_METRICS = 6
_COMPARED = {
    "config": "Configuration",
    "code": "Code",
    "packages": "Packages",
    "hardware": "Hardware",
    "data": "Data",
}


def parts_of(runs: Sequence[Facts]) -> list[Markup]:
    """Return the sections of the report of several runs."""
    parts: list[Callable[[Sequence[Facts]], Markup]] = [_headline, _results, _curves, _differences, _commands, _unread]
    return [part(runs) for part in parts]


def labels_of(runs: Sequence[Facts]) -> list[str]:
    """Return a short name for each run: its name where no two are equal, else with its id."""
    names = [one.run.name for one in runs]
    return names if len(set(names)) == len(names) else [one.run.path.name for one in runs]


def _headline(runs: Sequence[Facts]) -> Markup:
    states: dict[str, int] = {}
    for one in runs:
        states[one.state.name] = states.get(one.state.name, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    return element(
        "header",
        element("div", element("h1", f"{len(runs)} runs compared"), class_="title"),
        element("p", f"{', '.join(labels_of(runs))}: {counted}."),
    )


def _results(runs: Sequence[Facts]) -> Markup:
    names = _shared(runs)[:_MOST_METRICS]
    came, used = [], []
    for number, (label, facts) in enumerate(zip(labels_of(runs), runs, strict=True)):
        run = (chart.swatch(number), element("span", label, class_="whole"))
        best = f"{words.number(facts.best.value)} at {facts.best.step:,}" if facts.best else "-"
        step = f"{facts.step:,}" if facts.step is not None else "-"
        curves = facts.curves.by_name
        last = [words.number(curves[name].last[1]) if name in curves and curves[name].bins else "-" for name in names]
        came.append((*run, facts.state.name, step, best, *last))
        total, ledger = facts.bill.total, facts.ledger
        used.append(
            (
                *run,
                words.span(ledger["wall_s"]) if ledger else "-",
                words.percent(ledger["goodput"]) if ledger else "-",
                bill_text.hours(total) or "-",
                bill_text.energy(total.energy_kwh) if total.energy_kwh is not None else "-",
                bill_text.co2(total.co2_kg) if total.co2_kg is not None else "-",
                bill_text.money(total.cost, facts.bill.currency) if total.cost is not None else "-",
            )
        )
    metrics = {facts.best.metric for facts in runs if facts.best and facts.best.metric}
    header = ("", "run", "state", "step", f"best {metrics.pop() if len(metrics) == 1 else 'metric'}", *names)
    return section(
        "Results",
        table(header, came, numbers=range(3, len(header))),
        note("Metrics: the last value."),
        element("h3", "What they used"),
        table(("", "run", "wall time", "goodput", "devices", "energy", "CO2", "cost"), used, numbers=range(2, 8)),
    )


def _shared(runs: Sequence[Facts]) -> list[str]:
    """Return the metrics that at least two runs have, most telling first."""
    counted: dict[str, int] = {}
    for one in runs:
        for name, curve in one.curves.by_name.items():
            if curve.bins and not is_measured_time(name):
                counted[name] = counted.get(name, 0) + 1
    return sorted((name for name, count in counted.items() if count > 1), key=sections.rank)


def _curves(runs: Sequence[Facts]) -> Markup:
    labels = labels_of(runs)
    drawn = []
    names = [name for name in _shared(runs) if any(len(one.curves.by_name[name].bins) > 1 for one in _with(runs, name))]
    for name in names[: sections.MOST_CHARTS]:
        lines = [
            Line(label, one.curves.by_name[name], number)
            for number, (label, one) in enumerate(zip(labels, runs, strict=True))
            if name in one.curves.by_name and one.curves.by_name[name].bins
        ]
        drawn.append(chart.chart(name, lines, bands=len(lines) <= 2))
    left = len(names) - len(drawn)
    is_binned = any(curve.width > 1 for one in runs for curve in one.curves.by_name.values())
    remark = "Line: mean of the points of a bin." if is_binned else ""
    remark += f" {left} more metrics are left out." if left > 0 else ""
    return section("Curves", element("div", *drawn, class_="charts") if drawn else "", note(remark) if remark else "")


def _with(runs: Sequence[Facts], name: str) -> list[Facts]:
    return [one for one in runs if name in one.curves.by_name]


def _differences(runs: Sequence[Facts]) -> Markup:
    try:
        found = compare([one.run for one in runs], diffs=False)
    except (TrainerError, OSError, ValueError) as error:
        return section("What differs", note(f"Not compared: {getattr(error, 'message', error)}"))
    short = dict(zip(found.labels, labels_of(runs), strict=True))
    tables = [
        join([element("h3", title), _rows(found.sections[name], short)])
        for name, title in _COMPARED.items()
        if name in found.sections and found.sections[name].rows
    ]
    equal = [
        title.lower() for name, title in _COMPARED.items() if name in found.sections and not found.sections[name].rows
    ]
    return section("What differs", *tables, note(f"Equal: {', '.join(equal)}.") if equal else "")


def _rows(compared: Section, short: dict[str, str]) -> Markup:
    rows = [
        (element("code", key), *(_cell(key, values, label) for label in short))
        for key, values in list(compared.rows.items())[: sections.MOST_ROWS]
        if key not in ("name", "runs_dir")
    ]
    return table(("", *short.values()), rows)


def _cell(key: str, values: dict[str, Any], label: str) -> object:
    return element("code", words.value(shown(key, values[label]))) if label in values else "-"


def _commands(runs: Sequence[Facts]) -> Markup:
    items = [
        join(
            [
                element("h3", label),
                element("pre", f"trainer fit {one.typed}".rstrip() + f"\ntrainer repro {one.run.path.name}"),
            ]
        )
        for label, one in zip(labels_of(runs), runs, strict=True)
    ]
    return section("How to reproduce them", *items)


def _unread(runs: Sequence[Facts]) -> Markup:
    items = [
        element("li", f"{label}: {problem}")
        for label, one in zip(labels_of(runs), runs, strict=True)
        for problem in one.problems
    ]
    return section("Not in this report", element("ul", *items)) if items else Markup("")
