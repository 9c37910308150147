"""The sections of the report of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.report import chart, words
from trainer.report.chart import Line
from trainer.report.facts import Facts
from trainer.report.markup import Markup, element, join, note, pairs, section, table
from trainer.runs import bill_text
from trainer.runs.curves import Curve, Curves, is_measured_time
from trainer.runs.events import (
    BadStepEvent,
    CheckpointFailed,
    CheckpointSkipped,
    Event,
    Hang,
    NodeLost,
    OutOfMemory,
    Preflight,
    Straggler,
    Tracking,
)
from trainer.runs.facts import mapping

MOST_CHARTS = 24
MOST_ROWS = 200
"""Rows of a table, so that the report stays small."""
_MOST_PINS = 1000
_LONGEST_REASON = 300
_SPLITS = ("train", "val", "test")
_FIRST = ("loss", "acc", "accuracy", "perplexity")
_LAST = ("lr", "grad_norm")
_PACKAGES = ("trainer", "torch", "lightning", "deepspeed", "numpy", "hydra-core", "wandb")


def headline(facts: Facts) -> Markup:
    """Return the name of the run, its state, a sentence about it and its key figures."""
    state = facts.state.name
    title = element("h1", facts.run.name or facts.run.path.name, " ", element("span", facts.run.id, class_="id"))
    badge = element("span", state, class_=f"badge {state}")
    return element(
        "header", element("div", title, badge, class_="title"), element("p", _sentence(facts)), _figures(facts)
    )


def _sentence(facts: Facts) -> str:
    groups = {group: choice for group, choice, _ in facts.choices}
    what = " on ".join(filter(None, (groups.get("model"), groups.get("data")))) or "This run"
    strategy = facts.option("strategy", "name")
    ranks = words.plural(facts.world_size, "rank") if facts.world_size else ""
    devices = f" ({', '.join(facts.devices)})" if facts.devices else ""
    how = f", {strategy} on {ranks}{devices}" if strategy and ranks else ""
    began = words.moment(facts.starts[0].time) if facts.starts else None
    wall_s = (facts.ledger or {}).get("wall_s")
    steps = f"; {facts.step:,} optimizer steps" if facts.step is not None else ""
    took = f" in {words.span(wall_s)}" if wall_s and steps else ""
    since = f". Started {began}" if began else ""
    why = f". {_capitalized(_first_line(facts.state.reason))}" if facts.state.reason else ""
    return f"{what}{how}{steps}{took}{since}{why}"


def _first_line(reason: str) -> str:
    """Return the first line of a message, which may be long."""
    line = reason.strip().partition("\n")[0]
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figures(facts: Facts) -> Markup:
    """Return the numbers that a reader looks for first."""
    shown: list[tuple[str, str, str]] = []
    if facts.best:
        shown.append((f"best {facts.best.metric}", words.number(facts.best.value), f"at step {facts.best.step:,}"))
    if facts.step is not None:
        limit = facts.option("trainer", "max_steps")
        shown.append(("optimizer steps", f"{facts.step:,}", f"of {limit:,}" if isinstance(limit, int) else ""))
    if facts.ledger:
        queue_s = facts.ledger["seconds"]["queue"]
        queued = f"{words.span(queue_s)} of it queued" if queue_s >= 1 else ""
        shown.append(("wall time", words.span(facts.ledger["wall_s"]), queued))
        shown.append(("goodput", words.percent(facts.ledger["goodput"]), "useful steps"))
    total = facts.bill.total
    if bill_text.hours(total):
        amount, _, unit = bill_text.hours(total).partition(" ")
        shown.append(("devices", amount, unit))
    if total.energy_kwh is not None:
        shown.append(
            ("energy", bill_text.energy(total.energy_kwh), bill_text.co2(total.co2_kg) if total.co2_kg else "")
        )
    if total.cost is not None:
        shown.append(("cost", bill_text.money(total.cost, None), facts.bill.currency or ""))
    items = [
        element("div", element("dt", name), element("dd", figure, element("small", rest) if rest else ""))
        for name, figure, rest in shown
    ]
    return element("dl", *items, class_="figures") if items else Markup("")


def results(facts: Facts) -> Markup:
    """Return the table of the metrics, and what `trainer evaluate` has measured."""
    names = sorted((name for name in facts.curves.by_name if not is_measured_time(name)), key=rank)
    rows = [_result(name, facts.curves.by_name[name]) for name in names if facts.curves.by_name[name].bins]
    header = ("metric", "last", "at step", "smallest", "at step", "largest", "at step", "points")
    evaluated = [
        (f"step {one['step']:,}, {one.get('split', '')}", name, words.number(value))
        for one in facts.evaluations
        for name, value in sorted(one["metrics"].items())
    ]
    return section(
        "Results",
        table(header, rows[:MOST_ROWS], numbers=range(1, 8)),
        _left_out(len(rows)),
        element("h3", "Evaluated") if evaluated else "",
        table(("checkpoint", "metric", "value"), evaluated[:MOST_ROWS], numbers=(2,)),
    )


def _result(name: str, curve: Curve) -> tuple[object, ...]:
    (last_at, last), (low_at, low), (high_at, high) = curve.last, curve.low, curve.high
    texts = (words.number(last), f"{last_at:,}", words.number(low), f"{low_at:,}", words.number(high), f"{high_at:,}")
    return (element("code", name), *texts, f"{curve.count:,}")


def _left_out(count: int) -> Markup:
    return note(f"{count - MOST_ROWS:,} more rows are left out.") if count > MOST_ROWS else Markup("")


def curves(facts: Facts) -> Markup:
    """Return a chart for each metric; training, validation and test of one share it."""
    groups = grouped(facts.curves)
    resumed = [event.step for event in facts.starts if event.step]
    best = facts.best
    drawn = []
    for title, names in groups[:MOST_CHARTS]:
        lines = [Line(name, facts.curves.by_name[name], number) for number, name in enumerate(names)]
        mark = (best.metric, best.step, best.value) if best and best.metric in names else None
        drawn.append(chart.chart(names[0] if len(names) == 1 else title, lines, resumed_at=resumed, best=mark))
    if not drawn:
        return Markup("")
    remarks = []
    if any(curve.width > 1 for curve in facts.curves.by_name.values()):
        remarks.append("Line: mean of the points of a bin; band: from the smallest to the largest of them.")
    if resumed:
        remarks.append("Dotted: a restart or resume continued here.")
    if len(groups) > MOST_CHARTS:
        remarks.append(f"{len(groups) - MOST_CHARTS} more metrics are in metrics.jsonl.")
    if facts.curves.cut_at is not None:
        remarks.append(f"Reading was stopped at step {facts.curves.cut_at:,} to end in time; trainer report reads all.")
    return section("Curves", element("div", *drawn, class_="charts"), note(" ".join(remarks)) if remarks else "")


def grouped(curves: Curves) -> list[tuple[str, list[str]]]:
    """Return the charts: a title, and the names of the metrics in it that have at least two points."""
    groups: dict[str, list[str]] = {}
    for name, curve in sorted(curves.by_name.items(), key=lambda item: rank(item[0])):
        if len(curve.bins) >= 2:
            split, _, rest = name.partition("/")
            groups.setdefault(rest if split in _SPLITS and rest else name, []).append(name)
    # A single point of another split, such as one validation at the end, is drawn where there is a curve of it.
    for name, curve in curves.by_name.items():
        split, _, rest = name.partition("/")
        if len(curve.bins) == 1 and split in _SPLITS and rest in groups:
            groups[rest].append(name)
    return list(groups.items())


def rank(name: str) -> tuple[int, str, int]:
    """Return a sort key: losses, accuracies, others, then rates and the machine; training before validation."""
    split, _, rest = name.partition("/")
    short = rest if split in _SPLITS else name
    place = _FIRST.index(short) if short in _FIRST else 5
    place += 3 * (short in _LAST) + 5 * is_measured_time(name)
    return place, short, _SPLITS.index(split) if split in _SPLITS else 9


def asked(facts: Facts) -> Markup:
    """Return the command, the chosen groups and the values that differ from the defaults."""
    groups = [
        element("li", element("code", f"{group}={choice}"), class_="own" if choice != default else None)
        for group, choice, default in facts.choices[:MOST_ROWS]
    ]
    rows = [
        (element("code", one.key), element("code", words.value(one.value)), element("code", words.value(one.default)))
        for one in facts.differences
    ]
    return section(
        "Command and configuration",
        element("pre", f"trainer fit {facts.typed}".rstrip()),
        element("h3", "Values that are not the default") if rows else "",
        table(("key", "value", "default"), rows[:MOST_ROWS]),
        _left_out(len(rows)),
        element("h3", "Chosen groups") if groups else "",
        element("ul", *groups, class_="groups") if groups else "",
    )


def place(facts: Facts) -> Markup:
    """Return where the run ran, and with what."""
    manifest, machine = facts.manifest, mapping(facts.manifest.get("machine"))
    hosts = sorted({beat.host for beat in facts.beats.values() if beat.host})
    jobs = sorted({event.slurm_job_id for event in facts.starts if event.slurm_job_id})
    shape = facts.launch.shape
    versions = mapping(mapping(manifest.get("installed")).get("versions")) or mapping(manifest.get("packages"))
    packages = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if versions.get(name))
    code = mapping(manifest.get("code"))
    changed = " with uncommitted changes, which are in the code snapshot" if code.get("dirty") else ""
    return section(
        "Where it ran",
        pairs(
            [
                ("Cluster", facts.option("cluster", "name")),
                ("Shape", str(shape) if shape else None),
                ("Ranks at the end", facts.world_size),
                ("Hosts", ", ".join(hosts[:64]) + (f" and {len(hosts) - 64} more" if len(hosts) > 64 else "")),
                ("Devices", ", ".join(facts.devices)),
                ("Processor", machine.get("cpu")),
                ("System", manifest.get("platform")),
                ("SLURM jobs", ", ".join(jobs)),
                (
                    "W&B",
                    next((one.url for one in reversed(facts.events) if isinstance(one, Tracking) and one.url), None),
                ),
                ("Launched by", _by(manifest)),
                ("Sweep", _sweep(manifest)),
                ("Reproduces", mapping(manifest.get("reproduces")).get("name")),
                ("Python", manifest.get("python")),
                ("Packages", packages),
                ("Code", f"commit {code['commit']}{changed}" if code.get("commit") else None),
            ]
        ),
    )


def _sweep(manifest: dict[str, Any]) -> str | None:
    sweep = mapping(manifest.get("sweep"))
    return f"{sweep.get('name')}, trial {sweep.get('trial')}" if sweep else None


def _by(manifest: dict[str, Any]) -> str | None:
    user, host = manifest.get("user"), manifest.get("host")
    return f"{user} on {host}" if user and host else user or host


def faults(facts: Facts) -> Markup:
    """Return the attempts, and the faults that the run met."""
    starts = {event.attempt: event for event in facts.starts}
    ends = {end.attempt: end for end in facts.attempts}
    rows = []
    for number in sorted({*starts, *ends})[:MOST_ROWS]:
        start, end = starts.get(number), ends.get(number)
        from_step = f"{start.step:,}" if start else "-"
        to_step = f"{end.step:,}" if end and end.step is not None else "-"
        outcome = f"{end.outcome}{', restarted' if end.restarted else ''}" if end else "not recorded"
        began = words.moment(start.time) if start else None
        rows.append((number, began or "-", from_step, to_step, outcome, _first_line(end.reason) if end else ""))
    met = [(words.moment(event.time), event.event.replace("_", " "), what) for event, what in _incidents(facts.events)]
    survived = sum(1 for end in facts.attempts if end.restarted or end.outcome == "requeue")
    survived = min(survived, max(len(rows) - 1, 0))
    sentence = f"{_capitalized(words.plural(survived, 'interruption'))} survived." if survived else ""
    return section(
        "Attempts and faults",
        note(sentence) if sentence else "",
        table(("attempt", "began", "from step", "to step", "ended", "why"), rows, numbers=(2, 3)),
        element("h3", "Faults") if met else "",
        table(("time", "what", ""), met[:MOST_ROWS]),
        _left_out(len(met)),
    )


def _incidents(events: list[Event]) -> Iterator[tuple[Event, str]]:
    for event in events:
        if isinstance(
            event, (Hang, BadStepEvent, Straggler, OutOfMemory, CheckpointFailed, CheckpointSkipped, NodeLost)
        ):
            where = [f"step {event.step:,}"] if getattr(event, "step", None) is not None else []  # type: ignore[union-attr]
            where += [f"node {event.node}"] if isinstance(event, NodeLost) else []
            yield event, ", ".join([*where, *filter(None, [_first_line(event.reason or "")])])
        elif isinstance(event, Preflight) and event.bad:
            yield event, "; ".join(f"{node}: {problem}" for node, problem in event.bad.items())


def saved(facts: Facts) -> Markup:
    """Return the checkpoints on disk."""
    rows = [
        (
            f"{one['step']:,}",
            f"{one['bytes'] / 1e6:,.1f} MB" if one["bytes"] is not None else "-",
            ", ".join(f"{name} {words.number(value)}" for name, value in (one["metrics"] or {}).items()),
            "complete" if one["committed"] else "incomplete",
        )
        for one in facts.checkpoints
    ]
    table_ = table(("step", "size", "metrics", "state"), rows[:MOST_ROWS], numbers=(0, 1))
    return section("Checkpoints", table_, _left_out(len(rows)))


def again(facts: Facts) -> Markup:
    """Return how to reproduce the run, and the packages that it was made with."""
    versions = mapping(mapping(facts.manifest.get("installed")).get("versions"))
    pins = join((f"{name}=={version}" for name, version in sorted(versions.items())[:_MOST_PINS]), "\n")
    seed = facts.config.get("seed")
    return section(
        "How to reproduce it",
        element(
            "p",
            "With the run directory, which holds the code with its uncommitted changes, the configuration and the list "
            "of packages; the command names what cannot be restored:",
        ),
        element("pre", f"trainer repro {facts.run.path.name}"),
        note(f"Seed {seed}. Batches and their order follow from it at any number of ranks.")
        if seed is not None
        else "",
        element("details", element("summary", words.plural(len(versions), "installed package")), element("pre", pins))
        if pins
        else "",
    )


def unread(facts: Facts) -> Markup:
    """Return what could not be read."""
    items = [element("li", problem) for problem in facts.problems]
    return section("Not in this report", element("ul", *items)) if items else Markup("")
