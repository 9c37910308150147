"""Everything that a report shows of a run. What cannot be read is left out, and named in the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainer.core.errors import TrainerError
from trainer.core.files import read_text
from trainer.report.defaults import Difference, chosen, command, differences
from trainer.runs.bill import Bill, Charge, bill
from trainer.runs.comparison import devices_of
from trainer.runs.curves import Curves, read_curves
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Event, Started
from trainer.runs.facts import mapping
from trainer.runs.ledger import ledger
from trainer.runs.planned import Figure, plan_beside_run
from trainer.runs.records import AttemptOutcome, BestCheckpoint, HeartbeatRecord, Launch
from trainer.runs.state import State, ended_state, state_of
from trainer.runs.summary import best, checkpoints, evaluations

BINS = 120
"""Bins of a curve; at most twice as many are kept. A chart has about 370 pixels."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a run; empty values where something could not be read."""

    run: RunDirectory
    state: State
    launch: Launch
    config: dict[str, Any]
    manifest: dict[str, Any]
    typed: str
    """The overrides as they were typed."""
    choices: list[tuple[str, str, str]]
    """Group, chosen option, default option."""
    differences: list[Difference]
    events: list[Event]
    attempts: list[AttemptOutcome]
    beats: dict[int, HeartbeatRecord]
    """Last heartbeat by rank."""
    devices: list[str]
    ledger: dict[str, Any] | None
    bill: Bill
    plan: list[Figure]
    """What was planned, beside what was measured."""
    curves: Curves
    best: BestCheckpoint | None
    checkpoints: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def beat(self) -> HeartbeatRecord | None:
        """The last heartbeat of rank 0."""
        return self.beats.get(0)

    @property
    def step(self) -> int | None:
        """Completed optimizer steps."""
        if self.beat is not None:
            return self.beat.step
        return max((curve.last[0] for curve in self.curves.by_name.values() if curve.bins), default=None)

    @property
    def starts(self) -> list[Started]:
        """The starts of attempts."""
        return [event for event in self.events if isinstance(event, Started)]

    @property
    def world_size(self) -> int | None:
        """Number of ranks of the newest attempt."""
        known = [event.world_size for event in self.starts if event.world_size]
        return known[-1] if known else self.launch.shape.world_size if self.launch.shape else None

    def option(self, section: str, key: str) -> Any:
        """Return a scalar of the configuration; None if there is none."""
        value = mapping(self.config.get(section)).get(key)
        return value if isinstance(value, (str, int, float)) else None


def gather(run: RunDirectory, slurm_states: Mapping[str, str] | None = None, *, deadline: float | None = None) -> Facts:
    """Read everything about a run; never raises for what the files hold.

    Args:
        run: The run.
        slurm_states: As in `runs.state.state_of`.
        deadline: When to stop reading metrics, by `time.monotonic`; None: never.
    """
    problems: list[str] = []

    def read(what: str, function: Callable[[], T], otherwise: T) -> T:
        try:
            return function()
        except Exception as error:  # damage of any kind: the rest of the report is still of use
            reason = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
            problems.append(f"{what}: {reason}")
            return otherwise

    config: dict[str, Any] = read("configuration", run.config, {})
    manifest = mapping(read("manifest", run.manifest, dict[str, Any]()))
    choices = {str(group): option for group, option in mapping(manifest.get("choices")).items()}
    typed = read("overrides", lambda: read_text(run.overrides_path, errors="replace").strip(), "")
    launch = read("launch", run.launch, Launch())
    events: list[Event] = read("events", run.events, [])
    attempts: list[AttemptOutcome] = read("attempts", run.attempts, [])
    beats: dict[int, HeartbeatRecord] = read("heartbeats", run.heartbeats, {})
    state = read("state", lambda: _state(run, launch, attempts, slurm_states), State("dead", "not known"))
    limit = float("inf") if deadline is None else deadline
    now = time.time() if state.is_active else None
    spent: dict[str, Any] | None = read("time ledger", lambda: ledger(run, now), None)
    charged = read("bill", lambda: bill(run, config), Bill(total=Charge()))
    return Facts(
        run=run,
        state=state,
        launch=launch,
        config=config,
        manifest=manifest,
        typed=command(typed),
        choices=read("groups", lambda: chosen(choices), []),
        differences=read("defaults", lambda: differences(config, choices, typed, run.code_dir), []),
        events=events,
        attempts=attempts,
        beats=beats,
        devices=read("devices", lambda: devices_of(run), []),
        ledger=spent,
        bill=charged,
        plan=read("plan", lambda: plan_beside_run(run, config, charged.total, spent), []),
        curves=read("metrics", lambda: read_curves(run.metrics_path, BINS, limit), Curves()),
        best=read("best checkpoint", lambda: best(run, beats.get(0)), None),
        checkpoints=read("checkpoints", lambda: checkpoints(run, config), []),
        evaluations=read("evaluations", lambda: evaluations(run), []),
        problems=problems,
    )


def _state(
    run: RunDirectory, launch: Launch, attempts: list[AttemptOutcome], slurm_states: Mapping[str, str] | None
) -> State:
    """Return the state; of a run that is about to end, how it ends: its node process writes the report last."""
    ends = [end for end in attempts if end.attempt >= launch.attempt and not end.restarted]
    is_over = bool(ends) and ends[-1].outcome != "requeue"
    return ended_state(run, launch) if is_over else state_of(run, slurm_states)
