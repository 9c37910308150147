"""`trainer why [RUN]`: why a run waits, or why it ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from trainer.cli.advice import advice, standing_still
from trainer.cli.common import parser_of
from trainer.core.errors import EnvironmentFault
from trainer.launch.jobs import states_of, why_it_waits
from trainer.runs.cause import tail
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, runs_dir_from
from trainer.runs.state import State, state_of


def main(argv: list[str]) -> int:
    parser = parser_of("why", "Why a run waits in the queue, or how and where it ended.", "trainer why k3v9")
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    state = state_of(run, states_of([run]))
    found = {"id": run.id, "state": state.name, **_explain(run, state)}
    print(json.dumps(found, indent=1) if options.json else "\n".join(_sheet(run, found)))
    return 0


def _explain(run: RunDirectory, state: State) -> dict[str, Any]:
    """`why`: sentences. `attempts`: how those ended that ended badly, oldest first."""
    attempts = [_ended(run, record) for record in run.attempts() if record["outcome"] not in ("finished", "stopped")]
    if state.name in ("queued", "requeued"):
        try:
            return {"why": why_it_waits(run) or [state.reason], "attempts": attempts}
        except EnvironmentFault as error:
            return {"why": [error.message], "attempts": attempts}
    slow = [str(event["reason"]) for event in run.events() if event["event"] == "straggler"]
    if state.is_active:
        still = [text for text in [standing_still(run)] if text]
        return {"why": ([state.reason] if state.reason else []) + slow + still, "attempts": attempts}
    why = [state.reason] if state.reason else []
    last = (run.attempts() or [{}])[-1]
    return {"why": why + advice(run, state.reason, last), "attempts": attempts}


def _ended(run: RunDirectory, record: dict[str, Any]) -> dict[str, Any]:
    kept = ("attempt", "outcome", "reason", "where", "step", "rank", "host", "time", "log")
    found = {name: record.get(name) for name in kept}
    log = run.path / str(record["log"]) if record.get("log") else None
    return {**found, "line": _last_line(record, log)}


def _last_line(record: dict[str, Any], log: Path | None) -> str | None:
    lines = [line for line in record.get("lines") or (tail(log) if log else []) if line.strip()]
    return lines[-1] if lines else None


def _sheet(run: RunDirectory, found: dict[str, Any]) -> list[str]:
    lines = [f"{run.path.name} is {found['state']}" + (f": {found['why'][0]}" if found["why"] else "")]
    lines += [f"  {sentence}" for sentence in found["why"][1:]]
    for one in found["attempts"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["time"])) if one["time"] else ""
        place = f" on {one['host']}" if one["host"] else ""
        lines.append(f"  attempt {one['attempt']}, step {one['step']}, {when}{place}: {one['reason']}")
        if one["where"]:
            lines.append(f"    in {one['where']}")
        elif one["line"] and one["line"] not in one["reason"]:
            lines.append(f"    | {one['line']}")
        if one["log"]:
            lines.append(f"    in {one['log']}")
    return lines
