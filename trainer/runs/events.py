"""Define the events of a run: a dataclass for each kind of line in `events.jsonl`."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from trainer.core.files import parse_json
from trainer.core.records import BadRecord, absent, damaged, from_json, skip

_REPORTED, _MOST_DAMAGED = 5, 1000


def _now() -> float:
    return round(time.time(), 3)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run."""

    time: float = field(default_factory=_now)
    """Seconds since 1970."""
    event: str
    """The name of the event. Each subclass lists its own names."""


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, kw_only=True)
class Created(Event):
    """`trainer fit` has made the run directory."""

    event: Literal["created"] = "created"
    overrides: list[str] = field(default_factory=list)
    compose_s: float | None = absent()
    """Seconds from the start of the command: composing, checks, the plan, and what a person was asked."""
    snapshot_s: float | None = absent()
    """Seconds that freezing the configuration and the code took."""


@dataclass(frozen=True, kw_only=True)
class WandbEnvironment(Event):
    """W&B's settings in the environment of a launch. The job may run where its variables and files do not exist."""

    event: Literal["wandb"] = "wandb"
    mode: str | None = absent()
    source: str | None = absent()
    """Source of the mode, such as WANDB_MODE."""
    base_url: str | None = absent()
    entity: str | None = absent()
    """Entity, project and id of the W&B run are recorded here only under `wandb agent`, which chooses them."""
    project: str | None = absent()
    run_id: str | None = absent()
    sweep_id: str | None = absent()
    sweep_parameters: str | None = absent()
    """The file with the values that the sweep chose."""


@dataclass(frozen=True, kw_only=True)
class Queued(Event):
    """The run was submitted to SLURM."""

    event: Literal["queued"] = "queued"
    slurm_job_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """`trainer resume` is about to launch the run."""

    event: Literal["resumed"] = "resumed"
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Preflight(Event):
    """Result of the preflight of an allocation."""

    event: Literal["preflight"] = "preflight"
    bad: dict[str, str]
    """Node to its problem."""
    bytes_per_s: float | None
    """All-reduce speed of the slowest rank."""
    slow: dict[str, list[str]] | None = absent()
    """Node to its measurements that are slower than it usually is; such a node is used."""


@dataclass(frozen=True, kw_only=True)
class Allocated(Event):
    """SLURM has given the nodes of an attempt: of a new allocation, or `restarted` in the same one."""

    event: Literal["allocated", "restarted"]
    attempt: int
    slurm_job_id: str | None = None
    nodes: list[str] = field(default_factory=list)
    checkpoint: int | None = None
    """The step from which the attempt resumes."""
    since: float | None = absent()
    """When SLURM started the job; only of a new allocation."""


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The first rank of an attempt has chosen its checkpoint."""

    event: Literal["started"] = "started"
    attempt: int = 0
    step: int = 0
    """The step of the checkpoint; 0 without one."""
    world_size: int | None = None
    host: str | None = None
    slurm_job_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class FirstStep(Event):
    """The first rank of an attempt has completed its first step."""

    event: Literal["first_step"] = "first_step"
    attempt: int
    step: int
    began: float
    """When the node process was started, in seconds since 1970; that of the rank after a restart by torchrun."""
    seconds: dict[str, float]
    """Seconds since then by part: node (until torchrun has started the ranks), import, config, rendezvous, build (model
    and trainer), data, restore, first_step."""


@dataclass(frozen=True, kw_only=True)
class Tracking(Event):
    """W&B target of an attempt, and the source of its mode."""

    event: Literal["tracking"] = "tracking"
    logger: str = "wandb"
    mode: str | None = None
    source: str | None = None
    """Source of the mode."""
    id: str | None = absent()
    project: str | None = absent()
    url: str | None = absent()
    entity: str | None = absent()
    dir: str | None = absent()
    base_url: str | None = absent()


@dataclass(frozen=True, kw_only=True)
class LoggerVersions(Event):
    """The versions that the user-defined loggers have in the first attempt: run ids of MLflow, names of trackio."""

    event: Literal["loggers"] = "loggers"
    versions: dict[str, str | int | None]


@dataclass(frozen=True, kw_only=True)
class LoggerPositions(Event):
    """What the files of user-defined loggers held when the checkpoint of `step` was taken; a resume cuts them there."""

    event: Literal["logger_positions"] = "logger_positions"
    step: int
    positions: dict[str, dict[str, int]]
    """Folder, from the run directory if it is in there, to the size of each file: bytes, or rows of a CSV file."""


@dataclass(frozen=True, kw_only=True)
class LoggerFailed(Event):
    """A tracker could not be reached at the start of an attempt, which trains without it."""

    event: Literal["logger_failed"] = "logger_failed"
    logger: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint was committed."""

    event: Literal["checkpoint"] = "checkpoint"
    attempt: int | None = None
    step: int
    bytes: int | None = None
    blocked_s: float | None = absent()
    """Seconds that training was blocked."""
    written_s: float | None = absent()
    """Seconds from the start of writing to the commit."""


@dataclass(frozen=True, kw_only=True)
class CheckpointUploaded(Event):
    """A checkpoint is in the object store (`checkpoint.dir`), whole."""

    event: Literal["checkpoint_uploaded"] = "checkpoint_uploaded"
    attempt: int | None = None
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSkipped(Event):
    """A damaged checkpoint was not resumed from."""

    event: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written."""

    event: Literal["checkpoint_failed"] = "checkpoint_failed"
    attempt: int | None = None
    reason: str


StopRequester = Literal[
    "trainer stop",
    "Ctrl-C",
    "the command that follows it was interrupted",
    "the command that followed this run was killed",
    "the Stop button of W&B",
    "a tag of the W&B run",
    "trainer sweep stop",
    "pruned by its sweep",
]
"""Sender of a request to save and stop; the text of `control/stop`, for readers of the run directory."""


@dataclass(frozen=True, kw_only=True)
class StopRequested(Event):
    """The run was requested to save and stop."""

    event: Literal["stop_requested"] = "stop_requested"
    reason: str
    """A `StopRequester`."""


@dataclass(frozen=True, kw_only=True)
class Hang(Event):
    """No rank made progress for longer than the limit; null if the responsible rank is unknown."""

    event: Literal["hang"] = "hang"
    attempt: int
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    phase: str | None = None
    where: str | None = None
    """The innermost frame of its stack."""
    collective: str | None = None
    """The collective that this rank alone has not entered."""
    still_s: float
    """Seconds without progress."""
    reason: str | None = None


BadStepName = Literal["not_finite", "loss_spike"]


@dataclass(frozen=True, kw_only=True)
class BadStepEvent(Event):
    """The loss or a gradient was not finite, or the loss jumped."""

    event: BadStepName
    attempt: int = 0
    step: int
    reason: str | None = None
    action: str | None = None
    """stopped, skipped or rolled back."""
    again: bool = False
    """Whether this step was rolled back before."""


@dataclass(frozen=True, kw_only=True)
class Straggler(Event):
    """The other ranks wait for this one at every step."""

    event: Literal["straggler"] = "straggler"
    attempt: int
    rank: int
    host: str
    device: str | None = None
    own_s: float | None = None
    """Seconds of a batch that this rank spends on the work named in `reason`."""
    others_s: float | None = None
    """The median of the other ranks."""
    batch_s: float | None = None
    """Seconds of the whole batch."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(Event):
    """A rank ran out of memory."""

    event: Literal["out_of_memory"] = "out_of_memory"
    attempt: int
    rank: int
    host: str
    step: int
    reason: str
    batch_size: int | None
    """The global batch; null before the data was set up."""
    micro_batch: int | None
    """The micro-batch of the next attempt; null: no further attempt."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchFound(Event):
    """`trainer.find_micro_batch` has found the largest micro-batch that fits; all later attempts use it."""

    event: Literal["micro_batch_found"] = "micro_batch_found"
    attempt: int
    rank: int
    batch_size: int
    """The global batch."""
    micro_batch: int
    too_large: int | None
    """The next larger micro-batch, with which this rank ran out of memory; null: a rank's whole share fits."""


@dataclass(frozen=True, kw_only=True)
class NodeLost(Event):
    """A node of the allocation has failed."""

    event: Literal["node_lost"] = "node_lost"
    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Requeued(Event):
    """SLURM runs the job again, or another job of the run was submitted."""

    event: Literal["requeued"] = "requeued"
    slurm_job_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Notified(Event):
    """A message about the run was sent to people (section `notify`), or could not be."""

    event: Literal["notified"] = "notified"
    about: str
    """Kind of the message: finished, failed, requeued, ..."""
    key: str
    """What the message was about; it is not sent again."""
    channels: list[str]
    failed: dict[str, str] = field(default_factory=dict)
    """Channel to the reason why it did not take the message."""


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """An attempt has ended. preempted: it saved a checkpoint and will be requeued."""

    event: Literal["finished", "stopped", "preempted", "failed", "hung"]
    attempt: int | None = None
    step: int | None = None
    reason: str | None = None


@functools.cache
def classes() -> dict[str, type[Event]]:
    """Return the class of each name."""
    return {name: kind for kind in Event.__subclasses__() for name in get_args(get_type_hints(kind)["event"])}


def parse(text: str, path: Path) -> Iterator[Event]:
    """Yield the events in the text of `events.jsonl`, oldest first.

    A line that cannot be used is left out, and reported by its number, up to `_REPORTED` of them. A last line without
    its end is being written, or was cut short by a crash: it is left out silently. A file with `_MOST_DAMAGED` such
    lines is read no further.
    """
    *lines, last = text.split("\n")
    damaged_lines = 0
    for number, line in enumerate(lines, start=1):
        try:
            yield _event(line, f"{path}, line {number},")
        except BadRecord as error:
            damaged_lines += 1
            if damaged_lines <= _REPORTED:
                skip(error)
            if damaged_lines >= _MOST_DAMAGED:
                break
    if damaged_lines > _REPORTED:
        skip(damaged(path, f"{damaged_lines} lines cannot be used"))
    try:
        yield _event(last, f"{path}, last line,")
    except BadRecord:
        return


def _event(line: str, source: str) -> Event:
    try:
        content: Any = parse_json(line)
    except ValueError as error:
        raise damaged(source, str(error)) from None
    name = content.get("event") if isinstance(content, dict) else None
    kind = classes().get(name) if isinstance(name, str) else None
    event = from_json(kind or Event, content, source)
    if kind is None:
        raise damaged(source, f"event is {name!r}, which is not the name of an event", "event")
    if "time" not in content:
        raise damaged(source, "time is missing", "time")
    return event
