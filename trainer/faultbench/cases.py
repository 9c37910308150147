"""The faults of `trainer bench faults`: how each is injected, and the required outcome. Imports no torch."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint import faults
from trainer.checkpoint.store import CheckpointStore
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import ledger

STEPS = 20
CHECKPOINT_EVERY = 4
RANKS = 2

Between = Callable[[RunDirectory, random.Random], None]
"""Change to the run directory between the end of the first command and `trainer resume`."""
Check = Callable[[RunDirectory], "str | None"]
"""Check of a run beyond its final state. Returns the problem, or None."""


@dataclass(frozen=True)
class Case:
    """One fault in a job of `RANKS` ranks and `STEPS` steps, whose final state must equal that without the fault."""

    name: str
    overrides: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    resumes: bool | None = False
    """Whether the first command must end before the run is finished, so that `trainer resume` finishes it. None: it
    may, because the job may end before the fault takes effect, or recover from it.
    """
    between: Between | None = None
    check: Check | None = None
    server: str | None = None
    """Kind of the faulty W&B server (`bad_server.py`) that the job logs to."""
    second_attempt: bool = False
    """Start a second node process on the run while it trains: it must refuse to start."""


def draw(name: str, choose: random.Random) -> Case:
    """Draw a case of this kind: its ranks, steps and times."""
    return KINDS[name](choose)


def _injected(kind: str, choose: random.Random, ranks: list[int] | None = None, **options: Any) -> list[str]:
    ranks = ranks or [choose.randrange(RANKS)]
    arguments = {"step": choose.randrange(1, STEPS), "ranks": ranks, "kind": kind, **options}
    return ["+callbacks.fault._target_=trainer.faultbench.inject.InjectFault"] + [
        f"+callbacks.fault.{key}={value}" for key, value in arguments.items()
    ]


def _in_job(kind: str) -> Callable[[random.Random], Case]:
    """Return a kind of fault after which torchrun restarts the ranks."""

    def make(choose: random.Random) -> Case:
        delay_s = round(choose.random() * 0.05, 4) if kind in ("kill", "segfault") else 0.0
        return Case(kind, tuple(_injected(kind, choose, delay_s=delay_s)))

    return make


def _all_ranks(choose: random.Random) -> Case:
    return Case("kill both ranks", tuple(_injected("kill", choose, ranks=[0, 1])))


def _ends_job(kind: str, resumes: bool | None = None) -> Callable[[random.Random], Case]:
    def make(choose: random.Random) -> Case:
        return Case(kind, tuple(_injected(kind, choose)), resumes=resumes)

    return make


def _loader_worker(choose: random.Random) -> Case:
    return Case("kill_loader_worker", (*_injected("kill_loader_worker", choose), "data.num_workers=1"))


def _hangs(kind: str) -> Callable[[random.Random], Case]:
    def make(choose: random.Random) -> Case:
        rank = choose.randrange(RANKS)

        def names_the_rank(run: RunDirectory) -> str | None:
            hangs = run.events_of(events.Hang)
            if [event.rank for event in hangs] != [rank]:
                return f"rank {rank} hung, but the hang events name {[event.rank for event in hangs]}"
            answers = kind == "hang"  # a rank that is stopped (SIGSTOP) cannot write its collectives
            is_named = hangs[0].collective is not None
            return None if is_named == answers else f"wrong missing collective: {hangs[0].collective}"

        step = choose.randrange(2, STEPS)
        return Case(kind, tuple(_injected(kind, choose, ranks=[rank], step=step)), check=names_the_rank)

    return make


def _nan(policy: str) -> Callable[[random.Random], Case]:
    """Return a kind of fault: one loss is NaN, as after a bit flip. A rollback repeats it; a stop needs a resume."""
    action = {"stop": "stopped", "rollback": "rolled back"}[policy]

    def has_event(run: RunDirectory) -> str | None:
        actions = [event.action for event in run.events_of(events.BadStepEvent) if event.event == "not_finite"]
        return None if actions == [action] else f"expected one event not_finite ({action}), got {actions}"

    def make(choose: random.Random) -> Case:
        overrides = (*_injected("bad_loss", choose), f"resilience.on_nonfinite={policy}")
        return Case(f"NaN, {policy}", overrides, resumes=policy == "stop", check=has_event)

    return make


def _save_point(choose: random.Random) -> Case:
    point = choose.choice([point for point in faults.POINTS if not point.startswith("prune")])
    count = choose.randrange(1, 4)
    return Case(
        f"kill at {point}",
        ("resilience.max_restarts=0",),
        {faults.VARIABLE: f"{point}:{count}"},
        resumes=True,
    )


def _refused_write(error: str) -> Callable[[random.Random], Case]:
    """Return a kind of fault: a full or read-only disk. The run stops with that reason, and a resume finishes it."""

    def has_reason(run: RunDirectory) -> str | None:
        reasons = [event.reason for event in run.events_of(events.CheckpointFailed)]
        expected = {"ENOSPC": "No space left", "EROFS": "Read-only"}[error]
        return None if any(expected in reason for reason in reasons) else f"{expected!r} is not among: {reasons}"

    def make(choose: random.Random) -> Case:
        variables = {faults.VARIABLE: f"file.write:{choose.randrange(2, 5)}:{error}"}
        return Case(f"{error} while saving", ("resilience.max_restarts=0",), variables, resumes=True, check=has_reason)

    return make


def _damaged(name: str, between: Between) -> Callable[[random.Random], Case]:
    def make(choose: random.Random) -> Case:
        step = choose.randrange(2 * CHECKPOINT_EVERY + 1, STEPS)
        overrides = (
            *_injected("kill", choose, ranks=[0, 1], step=step),
            "resilience.max_restarts=0",
            "checkpoint.asynchronous=false",  # else the second newest checkpoint may not be complete yet
        )
        return Case(name, overrides, resumes=True, between=between, check=_skipped_one)

    return make


def _skipped_one(run: RunDirectory) -> str | None:
    return None if run.events_of(events.CheckpointSkipped) else "there is no event checkpoint_skipped"


def _newest_file(run: RunDirectory, choose: random.Random) -> Path:
    newest = CheckpointStore(run.checkpoints_dir).committed()[-1].path
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.name != "COMMIT"]
    return choose.choice(files)


def _truncate(run: RunDirectory, choose: random.Random) -> None:
    path = _newest_file(run, choose)
    with path.open("r+b") as file:
        file.truncate(choose.randrange(path.stat().st_size))


def _flip(run: RunDirectory, choose: random.Random) -> None:
    path = _newest_file(run, choose)
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def _stale_commit(run: RunDirectory, choose: random.Random) -> None:
    """Replace the COMMIT of the newest checkpoint by that of the one before."""
    before, newest = [checkpoint.path for checkpoint in CheckpointStore(run.checkpoints_dir).committed()][-2:]
    shutil.copy(before / "COMMIT", newest / "COMMIT")


def _lost_file(run: RunDirectory, choose: random.Random) -> None:
    _newest_file(run, choose).unlink()


def _slow_rank(choose: random.Random) -> Case:
    """Draw a straggler: the run finishes, and an event names the rank."""
    rank = choose.randrange(RANKS)

    def names_the_rank(run: RunDirectory) -> str | None:
        named = [event.rank for event in run.events_of(events.Straggler)]
        return None if named == [rank] else f"rank {rank} was slow, but the straggler events name {named}"

    overrides = (*_injected("slow", choose, ranks=[rank], step=0, delay_s=0.5), "resilience.straggler_after_s=0")
    return Case("slow rank", overrides, check=names_the_rank)


def _clock(choose: random.Random) -> Case:
    """Draw a clock jump of an hour: it does not count as a hang, and the time ledger still adds up."""

    def adds_up(run: RunDirectory) -> str | None:
        if run.events_of(events.Hang):
            return "there is an event hang"
        times = ledger(run)
        sum_s = sum(times["seconds"].values()) if times else 0.0
        return None if times and abs(sum_s - times["wall_s"]) < 1 else f"the time ledger does not add up: {times}"

    hours = choose.choice((-1, 1))
    return Case("clock jumps", tuple(_injected("clock", choose, ranks=[0, 1], delay_s=3600 * hours)), check=adds_up)


def _out_of_memory(choose: random.Random) -> Case:
    def has_reason(run: RunDirectory) -> str | None:
        reason = run.attempts()[0].reason
        return None if "ran out of memory" in reason else f"it ended for another reason: {reason}"

    return Case("out of memory", tuple(_injected("out_of_memory", choose)), resumes=True, check=has_reason)


def _slow_disk(choose: random.Random) -> Case:
    variables = {faults.VARIABLE: f"file.write:1:SLOW{choose.choice((0.01, 0.03))}"}
    return Case("slow disk", variables=variables)


def _vanished_checkpoints(choose: random.Random) -> Case:
    """Draw a deletion of all checkpoints: later saves create a new folder; without one a resume starts from step 0."""
    return Case("checkpoints vanish", tuple(_injected("remove_checkpoints", choose, ranks=[0])), resumes=None)


def _tracking(server: str) -> Callable[[random.Random], Case]:
    """Return a kind of fault: a faulty W&B server. The run continues without it and does not wait for it for long."""

    def make(choose: random.Random) -> Case:
        overrides = (
            "tracking=wandb",
            "tracking.mode=online",
            "tracking.init_timeout_s=5",
            "tracking.finish_timeout_s=5",
        )
        return Case(f"W&B {server}", overrides, {"WANDB_API_KEY": "0" * 40}, server=server)

    return make


def _two_attempts(choose: random.Random) -> Case:
    return Case("two attempts at once", second_attempt=True)


KINDS: dict[str, Callable[[random.Random], Case]] = {
    "kill": _in_job("kill"),
    "kill_both": _all_ranks,
    "segfault": _in_job("segfault"),
    "raise": _in_job("raise"),
    "exit": _in_job("exit"),
    "kill_loader_worker": _loader_worker,
    "kill_torchrun": _ends_job("kill_torchrun"),
    "kill_node": _ends_job("kill_node", resumes=True),
    "kill_all": _ends_job("kill_all", resumes=True),
    "hang": _hangs("hang"),
    "stop": _hangs("stop"),
    "nan_stop": _nan("stop"),
    "nan_rollback": _nan("rollback"),
    "save_point": _save_point,
    "enospc": _refused_write("ENOSPC"),
    "erofs": _refused_write("EROFS"),
    "truncated": _damaged("newest truncated", _truncate),
    "flipped": _damaged("newest with a flipped bit", _flip),
    "lost_file": _damaged("newest without a file", _lost_file),
    "stale_commit": _damaged("newest with a stale COMMIT", _stale_commit),
    "terminate": _ends_job("terminate"),
    "terminate_node": _ends_job("terminate_node"),
    "two_attempts": _two_attempts,
    "slow_rank": _slow_rank,
    "clock": _clock,
    "out_of_memory": _out_of_memory,
    "slow_disk": _slow_disk,
    "vanish": _vanished_checkpoints,
    "wandb_refuses": _tracking("refuses"),
    "wandb_silent": _tracking("silent"),
}
"""Function that draws a case of each kind."""
