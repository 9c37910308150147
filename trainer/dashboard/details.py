"""What the page of one run shows: its configuration, time line, checkpoints, ranks and what it was launched with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.core.errors import TrainerError
from trainer.core.records import to_json
from trainer.core.secrets import mask_inside
from trainer.dashboard.logs import log_names
from trainer.dashboard.rows import config_leaves
from trainer.launch.jobs import states_of, why_it_waits
from trainer.runs.bill import bill
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Event, Started
from trainer.runs.facts import mapping
from trainer.runs.ledger import by_rank
from trainer.runs.planned import plan_beside_run
from trainer.runs.summary import summary

_MOST_EVENTS, _MOST_RANKS = 2000, 256
_MANIFEST = ("user", "host", "python", "platform", "gpus", "machine", "packages", "created")


def details_of(run: RunDirectory, slurm_states: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what is recorded about a run, as plain data.

    Args:
        run: The run.
        slurm_states: As in `runs.state.state_of`; None: SLURM is queried for this run.

    Raises:
        TrainerError: The run is damaged.
    """
    states = slurm_states if slurm_states is not None else states_of([run])
    facts = summary(run, states)
    config, manifest = run.config(), mapping(run.manifest())
    events = run.events()
    details = {
        "facts": facts,
        "config": config_leaves(run),
        "overrides": _overrides(run),
        "manifest": {name: manifest.get(name) for name in _MANIFEST},
        "commit": {name: mapping(manifest.get("code")).get(name) for name in ("commit", "dirty")},
        "attempts": _attempts(run, events, facts),
        "events": [_event(event) for event in events[-_MOST_EVENTS:]],
        "events_left_out": max(0, len(events) - _MOST_EVENTS),
        "ranks": by_rank(run)[:_MOST_RANKS],
        "nodes": _nodes(run)[-_MOST_RANKS:],
        "plan": [one.cells() for one in plan_beside_run(run, config, bill(run, config).total, facts["ledger"])],
        "logs": log_names(run),
        "waits": _waits(run, facts["state"]),
    }
    masked: dict[str, Any] = mask_inside(details)
    return masked


def _overrides(run: RunDirectory) -> str:
    from trainer.core.files import read_text

    try:
        return read_text(run.overrides_path, 1 << 20, errors="replace").strip()
    except OSError:
        return ""


def _waits(run: RunDirectory, state: str) -> list[str]:
    """Return why SLURM lets it wait."""
    if state not in ("queued", "requeued"):
        return []
    try:
        return why_it_waits(run)
    except TrainerError:
        return []


def _event(event: Event) -> dict[str, Any]:
    return {name: value for name, value in to_json(event).items() if value is not None}


def _nodes(run: RunDirectory) -> list[dict[str, Any]]:
    """Return what each attempt has held and used on each node; watts are the mean over the time that it was held."""
    rows = []
    for usage in run.usage():
        joules = {part: sum(phases.values()) for part, phases in usage.joules.items()}
        rows.append(
            {
                "attempt": usage.attempt,
                "node": usage.node,
                "host": usage.host,
                "device": usage.device,
                "devices": usage.devices,
                "seconds": usage.seconds,
                "joules": joules,
                "watts": {part: value / usage.seconds for part, value in joules.items()} if usage.seconds > 0 else {},
                "missing": usage.missing,
            }
        )
    return rows


def _attempts(run: RunDirectory, events: list[Event], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each attempt when it began and ended, its steps, and the seconds of its first rank by phase."""
    newest = run.heartbeat(0)
    beats = {beat.attempt: beat for beat in [*run.past_heartbeats(0), *([newest] if newest else [])]}
    outcomes = {outcome.attempt: outcome for outcome in run.attempts()}
    starts = {event.attempt: event for event in events if isinstance(event, Started)}
    rows = []
    for number in sorted({*beats, *outcomes, *starts}):
        beat, outcome, start = beats.get(number), outcomes.get(number), starts.get(number)
        spent = beat.spent if beat and beat.spent else {}
        began = beat.began if beat and beat.began else start.time if start else None
        ended = outcome.time if outcome and outcome.time else None
        if ended is None and beat is not None:
            ended = beat.time if beat.began is None else max(beat.time, beat.began + sum(spent.values()))
        rows.append(
            {
                "attempt": number,
                "began": began,
                "ended": ended,
                "spent": spent,
                "first_step": beat.first_step if beat else start.step if start else None,
                "step": beat.step if beat else outcome.step if outcome else None,
                "outcome": outcome.outcome if outcome else None,
                "reason": outcome.reason if outcome else "",
                "where": outcome.where if outcome else None,
                "host": (outcome and outcome.host) or (start and start.host) or (beat and beat.host),
                "rank": outcome.rank if outcome else None,
                "world_size": start.world_size if start else facts.get("world_size"),
                "log": outcome.log if outcome else None,
                "lines": outcome.lines if outcome else [],
            }
        )
    return rows
