"""`trainer show [RUN]`: one run on one sheet."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit
from trainer.checkpoint.store import BEFORE_END
from trainer.cli.common import age, duration, number, parser_of, size
from trainer.core.errors import JOB_FAILED
from trainer.launch.jobs import states_of
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import by_rank
from trainer.runs.registry import find, reference_to, runs_dir_from
from trainer.runs.summary import summary


def main(argv: list[str]) -> int:
    parser = parser_of("show", "Everything known of one run.", "trainer show k3v9 --json")
    parser.add_argument("--verify", action="store_true", help="read every checkpoint again and compare its checksums")
    parser.add_argument("--ranks", action="store_true", help="also where each rank stands, and its time")
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    found = summary(run, states_of([run]))
    if options.verify:
        for one in found["checkpoints"]:
            one["problems"] = commit.verify(Path(one["path"]))
            one["verified"] = not one["problems"]
    if options.ranks:
        found["ranks"] = by_rank(run)
    print(json.dumps(found, indent=1) if options.json else "\n".join(_sheet(run, found)))
    damaged = any(one["verified"] is False for one in found["checkpoints"])
    return JOB_FAILED if damaged else 0


def _sheet(run: RunDirectory, found: dict[str, Any]) -> list[str]:
    lines = [f"{found['name']}  {found['id']}  {found['state']}" + (f": {found['reason']}" if found["reason"] else "")]
    lines.append(f"  directory    {found['path']}")
    command = run.overrides_path.read_text().strip() if run.overrides_path.exists() else ""
    lines.append(f"  command      trainer fit {command}")
    ranks = f"{found['world_size'] or '?'} rank{'' if found['world_size'] == 1 else 's'}"
    lines.append(f"  runs on      {ranks}, {found['strategy']}, {found['cluster']}")
    if found["tracking"]:
        lines.append(f"  tracking     {_tracking(found['tracking'])}")
    limit = f" of {found['max_steps']}" if found["max_steps"] else ""
    if found["step"] is not None:
        lines.append(f"  step         {found['step']}{limit}, epoch {found['epoch']}")
    if found["started"]:
        ended = found["ended"] or time.time()
        lines.append(f"  started      {age(found['started'])} ago, for {duration(ended - found['started'])}")
    if found["best"]:
        best = found["best"]
        lines.append(f"  best         {best['metric']} {number(best['value'])} at step {best['step']}")
    if found["ledger"]:
        lines += _block("time", _time(found["ledger"]))
    lines += _block("stragglers", [event["reason"] for event in found["stragglers"]])
    lines += _block("ranks", _ranks(found.get("ranks", [])))
    lines += _block("metrics", [f"{name}  {number(value)}" for name, value in sorted(found["metrics"].items())])
    lines += _block("checkpoints", _checkpoints(found["checkpoints"]))
    lines += _block("attempts", [_attempt(one) for one in run.attempts()])
    lines.append(f"  next         {_next(run, found)}")
    return lines


def _tracking(told: dict[str, Any]) -> str:
    """`W&B offline (WANDB_MODE), project trainer, in /runs/a/wandb`."""
    project = f", project {told['project']}" if told["project"] else ""
    where = told["url"] or (f"in {told['dir']}" if told["dir"] else "")
    return f"W&B {told['mode']} ({told['source']}){project}" + (f", {where}" if where else "")


def _time(ledger: dict[str, Any]) -> list[str]:
    """Effective training time and goodput, then the classes that took any."""
    effective, goodput = ledger["effective"] or 0.0, ledger["goodput"] or 0.0
    told = f"{_seconds(ledger['wall_s'])}: {effective:.0%} effective training, {goodput:.0%} goodput"
    return [told, _classes(ledger["seconds"])]


def _classes(spent: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_seconds(seconds)}" for name, seconds in spent.items() if seconds >= 0.05
    )


def _ranks(rows: list[dict[str, Any]]) -> list[str]:
    """Of each two lines: where it stands and how fast it is, and its time."""
    lines = []
    for row in rows:
        own = f", {row['own_s']:.3g} s of {row['batch_s']:.3g} s a batch alone" if row["own_s"] else ""
        lines.append(f"{row['rank']}  {row['host']}, {row['device']}: {row['phase']} at step {row['step']}{own}")
        lines.append(f"   {_classes(row['seconds'] or {})}")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _block(title: str, rows: list[str]) -> list[str]:
    return [f"  {title if index == 0 else '':<13}{row}" for index, row in enumerate(rows)]


def _checkpoints(found: list[dict[str, Any]]) -> list[str]:
    """Step, size, metrics and state of each, in columns."""
    rows = [[_step(one), size(one["bytes"]), _measured(one), _state(one)] for one in found]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip() for row in rows
    ]


def _step(one: dict[str, Any]) -> str:
    return f"step {one['step']}" + (", before on_train_end" if one["path"].endswith(BEFORE_END) else "")


def _measured(one: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in (one["metrics"] or {}).items())


def _state(one: dict[str, Any]) -> str:
    where = f", on this node only: {one['path']}" if one["local"] else ""
    if one["verified"] is not None:
        return ("checksums right" if one["verified"] else f"DAMAGED: {'; '.join(one['problems'])}") + where
    return ("complete" if one["committed"] else "not complete") + where


def _attempt(record: dict[str, Any]) -> str:
    reason = f": {record['reason']}" if record.get("reason") else ""
    step = record.get("step")
    return f"{record['attempt']}  {record['outcome']} {'at the start' if step is None else f'at step {step}'}{reason}"


def _next(run: RunDirectory, found: dict[str, Any]) -> str:
    name, ends = reference_to(run), run.attempts()
    if found["state"] in ("starting", "running", "queued", "requeued", "stopping"):
        return f"trainer logs -f {name}   or   trainer stop {name}"
    if found["state"] == "finished":
        return f"trainer evaluate {name}   or   trainer resume {name} trainer.max_steps=..."
    if ends and ends[-1].get("mend"):  # a resume would fail again
        return f"trainer why {name}   and, once it is mended, the command above"
    return f"trainer logs {name}   or   trainer resume {name}"
