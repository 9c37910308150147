"""`trainer show [RUN]`: show everything that is recorded about a run."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit
from trainer.checkpoint.node_disk import folder_of
from trainer.checkpoint.store import BEFORE_END
from trainer.cli.common import age, duration, number, size
from trainer.cli.options import add_output_options, add_run, make_parser
from trainer.cli.sparkline import sparkline
from trainer.core.errors import DONE, JOB_FAILED
from trainer.core.text import indented
from trainer.launch.follow import typed
from trainer.launch.jobs import states_of
from trainer.report.write import FILE as REPORT
from trainer.runs import bill_text
from trainer.runs.bill import Bill, bill
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import by_rank
from trainer.runs.planned import Figure, plan_beside_run
from trainer.runs.records import AttemptOutcome
from trainer.runs.registry import find, reference_to, runs_dir_from, shortest
from trainer.runs.remote_checkpoints import remote_of, url_of
from trainer.runs.reproduction import first_of
from trainer.runs.sampled import sampled_curves
from trainer.runs.starts import starts
from trainer.runs.summary import summary

_INDENT, _NARROWEST, _WIDEST = 15, 8, 30
"""Columns before a metric, and of its curve."""
_HOSTS = 4
"""Hosts that are named for a checkpoint on the disks of several."""
_STARTS = 3
"""Attempts whose time to the first step is shown."""


def main(argv: list[str]) -> int:
    """Run `trainer show` and return the exit code: 1 if --verify finds a damaged checkpoint."""
    description = (
        "Show the state, progress, time ledger, metrics, checkpoints and attempts of a run, and the commands that "
        "usually come next."
    )
    parser = make_parser("show", description, "trainer show k3v9 --verify")
    add_run(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="verify the checksums of every checkpoint; exit code 1 if one is damaged",
    )
    parser.add_argument(
        "--ranks", action="store_true", help="also show the host, position, speed and time ledger of each rank"
    )
    add_output_options(parser)
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    facts = summary(run, states_of([run]))
    facts["reproduces"] = first_of(run)
    charged = bill(run)
    figures = plan_beside_run(run, run.config(), charged.total, facts["ledger"])
    facts["plan"] = [{"name": one.name, "planned": one.planned, "measured": one.measured} for one in figures] or None
    facts["starts"] = starts(run)
    if options.verify:
        for checkpoint in facts["checkpoints"]:
            if checkpoint["nodes"] and not checkpoint["here"]:
                continue  # the disks of other nodes
            checkpoint["problems"] = _verify(run, checkpoint)
            checkpoint["verified"] = not checkpoint["problems"]
    if options.ranks:
        facts["ranks"] = by_rank(run)
    print(
        json.dumps(facts, indent=1) if options.json else "\n".join(map(indented, _sheet(run, facts, charged, figures)))
    )
    damaged = any(checkpoint["verified"] is False for checkpoint in facts["checkpoints"])
    return JOB_FAILED if damaged else DONE


def _verify(run: RunDirectory, checkpoint: dict[str, Any]) -> list[str]:
    """Return the problems of a checkpoint, in the run directory, on the disks of nodes, and in the object store."""
    path = Path(checkpoint["path"])
    parts = [folder_of(path.parent.parent, one["node"]) / path.name for one in checkpoint["nodes"]] or [path]
    problems = [problem for part in parts if part.is_dir() for problem in commit.verify(part)]
    remote = remote_of(run, url_of(run.config())) if checkpoint["remote"] else None
    if remote is not None:
        name = Path(checkpoint["path"]).name
        problems += [f"{checkpoint['remote']}: {problem}" for problem in remote.verify(name)]
    return problems


def _sheet(run: RunDirectory, facts: dict[str, Any], charged: Bill, figures: list[Figure]) -> list[str]:
    lines = [f"{facts['name']}  {facts['id']}  {facts['state']}" + (f": {facts['reason']}" if facts["reason"] else "")]
    lines.append(f"  directory    {facts['path']}")
    lines.append(f"  command      trainer fit {typed(run)}")
    if facts["reproduces"]:
        lines.append(f"  reproduces   {facts['reproduces']}")
    ranks = f"{facts['world_size'] or '?'} rank{'' if facts['world_size'] == 1 else 's'}"
    lines.append(f"  runs on      {ranks}, {facts['strategy']}, {facts['cluster']}")
    if facts["tracking"]:
        lines.append(f"  tracking     {_tracking(facts['tracking'], facts['wandb'] or {})}")
    limit = f" of {facts['max_steps']}" if facts["max_steps"] else ""
    if facts["step"] is not None:
        lines.append(f"  step         {facts['step']}{limit}, epoch {facts['epoch']}")
    if facts["started"]:
        ended = facts["ended"] or time.time()
        lines.append(f"  started      {age(facts['started'])} ago, for {duration(ended - facts['started'])}")
    if facts["best"]:
        best = facts["best"]
        lines.append(f"  best         {best['metric']} {number(best['value'])} at step {best['step']}")
    if facts["ledger"]:
        lines += _block("time", _time(facts["ledger"]))
    lines += _block("bill", bill_text.sheet(charged))
    lines += _block("plan", _plan(figures))
    lines += _block("first step", [_start(one) for one in facts["starts"][-_STARTS:]])
    lines += _block("stragglers", [event["reason"] for event in facts["stragglers"]])
    lines += _block("ranks", _ranks(facts.get("ranks", [])))
    lines += _block("metrics", _metric_lines(run, facts["metrics"]))
    lines += _block("evaluated", [_evaluation(one) for one in facts["evaluations"]])
    lines += _block("checkpoints", _checkpoints(facts["checkpoints"], url_of(run.config())))
    lines += _block("attempts", [_attempt(outcome) for outcome in run.attempts()])
    if os.path.isfile(run.path / REPORT):
        lines.append(f"  report       {shortest(run.path / REPORT)}")
    lines.append(f"  next         {_next(run, facts)}")
    return lines


def _tracking(tracking: dict[str, Any], wandb: dict[str, Any]) -> str:
    """Describe the tracking: `W&B offline (WANDB_MODE), project trainer, in /runs/a/wandb`."""
    project = f", project {tracking['project']}" if tracking["project"] else ""
    sweep = f", sweep {wandb['sweep_id']}" if wandb.get("sweep_id") else ""
    where = tracking["url"] or wandb.get("url") or (f"in {tracking['dir']}" if tracking["dir"] else "")
    return f"W&B {tracking['mode']} ({tracking['source']}){project}{sweep}" + (f", {where}" if where else "")


def _time(ledger: dict[str, Any]) -> list[str]:
    """Return a line with the effective training time and the goodput, and one with the classes of the ledger."""
    effective, goodput = ledger["effective"] or 0.0, ledger["goodput"] or 0.0
    total = f"{_seconds(ledger['wall_s'])}: {effective:.0%} effective training, {goodput:.0%} goodput"
    return [total, _classes(ledger["seconds"])]


def _classes(spent: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_seconds(seconds)}" for name, seconds in spent.items() if seconds >= 0.05
    )


def _plan(figures: list[Figure]) -> list[str]:
    """Return a line for each planned figure: `step  12.3 ms planned, 13.1 ms measured (+7%)`."""
    width = max((len(one.name) for one in figures), default=0)
    lines = []
    for name, planned, measured, difference in (one.cells() for one in figures):
        found = measured if measured == "not measured" else f"{measured} measured"
        lines.append(f"{name:<{width}}  {planned} planned, {found}" + (f" ({difference})" if difference else ""))
    return lines


def _start(start: dict[str, Any]) -> str:
    attempt = f"attempt {start['attempt']}, " if start["attempt"] else ""
    return f"{attempt}after {_seconds(start['total_s'])}: {_classes(start['seconds'])}"


def _metric_lines(run: RunDirectory, metrics: dict[str, Any]) -> list[str]:
    """Return the last value of each metric, and its curve where that fits beside it."""
    curves = sampled_curves(run.metrics_path)
    names, values = (
        max((len(text) for text in texts), default=0) for texts in (metrics, map(number, metrics.values()))
    )
    room = min(shutil.get_terminal_size((80, 24)).columns, 80) - _INDENT - names - values - 4
    drawn = {name: sparkline(curves.get(name, []), min(room, _WIDEST)) for name in metrics if room >= _NARROWEST}
    if not any(drawn.values()):
        return [f"{name}  {number(value)}" for name, value in sorted(metrics.items())]
    return [
        f"{name:<{names}}  {number(value):<{values}}  {drawn[name]}".rstrip() for name, value in sorted(metrics.items())
    ]


def _evaluation(evaluation: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {number(value)}" for name, value in sorted(evaluation["metrics"].items()))
    return f"step {evaluation['step']}, {evaluation['split']}: {metrics}"


def _ranks(rows: list[dict[str, Any]]) -> list[str]:
    """Return two lines per rank: its position and speed, and its time ledger."""
    lines = []
    for row in rows:
        own = f", {row['own_s']:.3g} s of {row['batch_s']:.3g} s per batch without waiting" if row["own_s"] else ""
        lines.append(f"{row['rank']}  {row['host']}, {row['device']}: {row['phase']} at step {row['step']}{own}")
        lines.append(f"   {_classes(row['seconds'] or {})}")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _block(title: str, rows: list[str]) -> list[str]:
    return [f"  {title if index == 0 else '':<13}{row}" for index, row in enumerate(rows)]


def _checkpoints(checkpoints: list[dict[str, Any]], url: str | None) -> list[str]:
    """Return the step, size, metrics and state of each checkpoint, in columns; `url`: of the object store, if any."""
    rows = [[_step(one), size(one["bytes"]), _metrics(one), _state(one) + _place(one, url)] for one in checkpoints]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip() for row in rows
    ]


def _step(checkpoint: dict[str, Any]) -> str:
    return f"step {checkpoint['step']}" + (", before on_train_end" if checkpoint["path"].endswith(BEFORE_END) else "")


def _metrics(checkpoint: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in (checkpoint["metrics"] or {}).items())


def _state(checkpoint: dict[str, Any]) -> str:
    where = f", node-local: {_nodes(checkpoint['nodes']) or checkpoint['path']}" if checkpoint["local"] else ""
    if checkpoint["verified"] is not None:
        return (
            "checksums match" if checkpoint["verified"] else f"DAMAGED: {'; '.join(checkpoint['problems'])}"
        ) + where
    return ("complete" if checkpoint["committed"] else "incomplete") + where


def _nodes(nodes: list[dict[str, Any]]) -> str:
    hosts = [one["host"] for one in nodes]
    more = f" and {len(hosts) - _HOSTS} more" if len(hosts) > _HOSTS else ""
    return ", ".join(hosts[:_HOSTS]) + more


def _place(checkpoint: dict[str, Any], url: str | None) -> str:
    if checkpoint.get("remote"):
        return f", in {checkpoint['remote']}" + ("" if checkpoint["here"] else " only")
    return f", not in {url}" if url is not None and not checkpoint["local"] else ""


def _attempt(outcome: AttemptOutcome) -> str:
    reason = f": {outcome.reason}" if outcome.reason else ""
    place = "before the first step" if outcome.step is None else f"at step {outcome.step}"
    return f"{outcome.attempt}  {outcome.outcome} {place}{reason}"


def _next(run: RunDirectory, facts: dict[str, Any]) -> str:
    name, ends = reference_to(run), run.attempts()
    if facts["state"] in ("starting", "running", "queued", "requeued", "stopping"):
        return f"trainer logs -f {name}   or   trainer stop {name}"
    if facts["state"] == "finished":
        return f"trainer evaluate {name}   or   trainer resume {name} trainer.max_steps=..."
    if ends and ends[-1].mend:  # a resume would fail again
        return f"trainer why {name}   and, after fixing the cause, the command above"
    return f"trainer logs {name}   or   trainer resume {name}"
