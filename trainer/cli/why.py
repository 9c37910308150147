"""`trainer why [RUN]`: explain why a run is queued, or why it ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from trainer.cli.advice import advice, stalled
from trainer.cli.options import add_output_options, add_run, make_parser
from trainer.core.errors import DONE, EnvironmentFault
from trainer.core.text import indented
from trainer.launch.jobs import states_of, why_it_waits
from trainer.runs.cause import tail
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Straggler
from trainer.runs.records import AttemptOutcome
from trainer.runs.registry import find, runs_dir_from
from trainer.runs.state import State, state_of

_DESCRIPTION = (
    "Explain why a run waits in the queue, which rank slows down a running one, or how, where and why its "
    "attempts failed and what to do about it."
)


def main(argv: list[str]) -> int:
    """Run `trainer why` and return the exit code."""
    parser = make_parser("why", _DESCRIPTION, "trainer why k3v9")
    add_run(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    state = state_of(run, states_of([run]))
    answer = {"id": run.id, "state": state.name, **_explain(run, state)}
    print(json.dumps(answer, indent=1) if options.json else "\n".join(map(indented, _sheet(run, answer))))
    return DONE


def _explain(run: RunDirectory, state: State) -> dict[str, Any]:
    """Return `why`, a list of sentences, and `attempts`, the ends of the attempts that failed, oldest first."""
    attempts = [_end(run, one) for one in run.attempts() if one.outcome not in ("finished", "stopped")]
    if state.name in ("queued", "requeued"):
        try:
            return {"why": why_it_waits(run) or [state.reason], "attempts": attempts}
        except EnvironmentFault as error:
            return {"why": [error.message], "attempts": attempts}
    if state.is_active:
        why = [state.reason] if state.reason else []
        why += [event.reason for event in run.events_of(Straggler)]
        why += [sentence for sentence in [stalled(run)] if sentence]
        return {"why": why, "attempts": attempts}
    why = [state.reason] if state.reason else []
    last = None if state.name == "dead" else next(reversed(run.attempts()), None)
    return {"why": why + advice(run, state.reason, last), "attempts": attempts}


def _end(run: RunDirectory, outcome: AttemptOutcome) -> dict[str, Any]:
    """Return the fields of an attempt's record that are shown, and the last line of its traceback or log."""
    names = ("attempt", "outcome", "reason", "where", "step", "rank", "host", "time", "log")
    log = _inside(run, outcome.log) if outcome.log else None
    return {**{name: getattr(outcome, name) for name in names}, "line": _last_line(outcome, log)}


def _inside(run: RunDirectory, log: str) -> Path | None:
    """Return the path of a log of this run; None for a path that leads out of the run directory."""
    path = run.path / log
    try:
        return path if path.resolve().is_relative_to(run.path.resolve()) else None
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null character
        return None


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # no time of this calendar
        return ""


def _last_line(outcome: AttemptOutcome, log: Path | None) -> str | None:
    lines = [line for line in outcome.lines or (tail(log) if log else []) if line.strip()]
    return lines[-1] if lines else None


def _sheet(run: RunDirectory, answer: dict[str, Any]) -> list[str]:
    lines = [f"{run.path.name} is {answer['state']}" + (f": {answer['why'][0]}" if answer["why"] else "")]
    lines += [f"  {sentence}" for sentence in answer["why"][1:]]
    for attempt in answer["attempts"]:
        when = _clock(attempt["time"]) if attempt["time"] else ""
        place = f" on {attempt['host']}" if attempt["host"] else ""
        step = "before the first step" if attempt["step"] is None else f"step {attempt['step']}"
        lines.append(f"  attempt {attempt['attempt']}, {step}, {when}{place}: {attempt['reason']}")
        if attempt["where"]:
            lines.append(f"    in {attempt['where']}")
        elif attempt["line"] and attempt["line"] not in attempt["reason"]:
            lines.append(f"    | {attempt['line']}")
        if attempt["log"]:
            lines.append(f"    in {attempt['log']}")
    return lines
