"""What differed first between a training that was killed and one that was not, and its likely reason. No torch.

Reads the traces of `faultbench/trace.py`. What goes into a batch is compared in the order in which one thing makes
another differ, so that the first is the cause: data that came in another order makes another loss, not the reverse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

KINDS = {
    "hash": (
        "the order of Python's sets and the hash of texts",
        "PYTHONHASHSEED is not the same: what is made of a set (a vocabulary) has another order in each process",
    ),
    "progress": (
        "the counters of epochs, batches and steps",
        "a hook or callback changes the loops' progress, or a checkpoint was saved where they were not complete",
    ),
    "data": (
        "the batch",
        "the data came in another order or with other values: a loader or sampler that keeps its own order (give it "
        "state_dict and load_state_dict), an iterable dataset, or random transforms that draw from their own generator",
    ),
    "frozen": (
        "which parameters are frozen",
        "a callback or hook freezes or thaws them at the start of an epoch, and not on a resume in the middle of one",
    ),
    "accumulation": (
        "how many batches are accumulated",
        "a callback sets it at the start of an epoch, and not on a resume in the middle of one",
    ),
    "parameters": (
        "the weights before the batch",
        "something changes them when a training starts or is loaded (on_train_start, on_load_checkpoint, setup), or "
        "after the last moment at which a checkpoint is saved",
    ),
    "buffers": (
        "a buffer",
        "a buffer that is not saved (persistent=False) and is written through `.data`, or is changed when a training "
        "starts",
    ),
    "options": (
        "the optimizer's options",
        "a learning rate or another option is set by code that does not know where it is after a resume: a schedule "
        "of your own, or a callback without state_dict",
    ),
    "optimizer": (
        "the optimizer's state",
        "the optimizer keeps state that its state_dict does not return, or is changed when a training starts",
    ),
    "schedulers": (
        "a learning rate scheduler",
        "a scheduler that was stepped once more or once less, or keeps state that its state_dict does not return",
    ),
    "callbacks": (
        "the state of a callback",
        "its load_state_dict does not restore what its state_dict returned",
    ),
    "attributes": (
        "an attribute that is in no checkpoint",
        "return it in state_dict (a callback) or put it in the checkpoint in on_save_checkpoint (a module), and take "
        "it back on loading; a number that the model uses can be a buffer: register_buffer",
    ),
    "random": (
        "the random number generators",
        "something draws random numbers when a training starts or resumes, after the generators were restored",
    ),
}
"""What goes into a batch, the first cause first: what it is, and the likely reason where it differs."""
_MAY_DIFFER = ("hash", "callbacks", "attributes")
"""Two runs may, from the beginning."""
_NOT_DETERMINISTIC = (
    "all that went in is equal, and what came out is not: an operation that does not give the same bits each time; try "
    "trainer.deterministic=true"
)


@dataclass(frozen=True)
class Diagnosis:
    """The first difference in the order of the batches."""

    where: str
    what: str
    reason: str
    also: str | None = None
    """What else differs at that place."""
    effect: str | None = None
    """Where the weights or the loss differ first, if that is later."""


def steps_per_epoch(run: Path) -> int | None:
    """Optimizer steps of an epoch, from the trace; None where the loader has no length."""
    for record in _records(run / "trace", 0, 0).values():
        return None if record["steps_per_epoch"] is None else int(record["steps_per_epoch"])
    return None


def diagnose(killed: Path, unharmed: Path) -> Diagnosis | None:
    """None where the traces are equal."""
    ranks = sorted({int(path.stem.rpartition("-")[2]) for path in (unharmed / "trace").glob("*.jsonl")})
    found = [one for rank in ranks if (one := _first(killed / "trace", unharmed / "trace", rank)) is not None]
    return min(found, key=lambda one: one[0])[1] if found else None


def _first(killed: Path, unharmed: Path, rank: int) -> tuple[tuple[int, int], Diagnosis] | None:
    """Of one rank, with (attempt, batch) to order them by."""
    theirs = _records(unharmed, 0, rank)
    clocks = _differs_anyway(_records(killed, 0, rank), theirs)
    attempts = sorted({int(path.name.split("-")[1]) for path in killed.glob(f"attempt-*-rank-{rank}.jsonl")})
    first: tuple[tuple[int, int], Diagnosis] | None = None
    for attempt in attempts:
        ours = _records(killed, attempt, rank)
        begins = min(ours, default=0)
        for batch in sorted(ours):
            if batch not in theirs:
                continue
            differences = _differences(ours[batch]["in"], theirs[batch]["in"], clocks)
            out = ours[batch]["out"] != theirs[batch]["out"]
            if first is not None:
                if out:
                    step = ours[batch]["step"]
                    place, one = first
                    return place, replace(one, effect=f"the weights or the loss differ from step {step} on")
                continue
            if not differences and not out:
                continue
            where = _place(ours[batch], attempt, batch == begins, rank)
            if not differences:
                return (attempt, batch), Diagnosis(where, "the result", _NOT_DETERMINISTIC)
            (kind, what), *more = differences.items()
            told = Diagnosis(where, what, KINDS[kind][1], "; ".join(text for _, text in more) or None)
            if out:
                return (attempt, batch), told
            first = (attempt, batch), told
    return first


def _differs_anyway(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> set[tuple[str, str]]:
    """What differs from the very first batch on, before anything was killed: times, names of folders."""
    if 0 not in ours or 0 not in theirs:
        return set()
    mine, other = ours[0]["in"], theirs[0]["in"]
    return {(kind, name) for kind in _MAY_DIFFER for name in mine[kind] if mine[kind][name] != other[kind].get(name)}


def _differences(ours: dict[str, Any], theirs: dict[str, Any], leave_out: set[tuple[str, str]]) -> dict[str, str]:
    """Kind to what of it differs, the first cause first."""
    found = {}
    for kind, (what, _) in KINDS.items():
        mine, other = ours[kind], theirs[kind]
        names = [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]
        told = [_told(kind, name, mine.get(name), other.get(name)) for name in names if (kind, name) not in leave_out]
        if told:
            more = f" and {len(told) - 3} more" if len(told) > 3 else ""
            found[kind] = f"{what}: {', '.join(told[:3])}{more}"
    return found


def _told(kind: str, name: str, mine: Any, other: Any) -> str:
    """Checksums say nothing to a reader; values do."""
    if isinstance(mine, str) or isinstance(other, str) or kind in ("progress", "accumulation"):
        return f"{name} is {'not set' if mine is None else mine} instead of {'not set' if other is None else other}"
    return name


def _place(record: dict[str, Any], attempt: int, is_first: bool, rank: int) -> str:
    where = f"epoch {record['in']['progress']['epoch']}, step {record['step']}, rank {rank}"
    if attempt == 0:
        return f"{where}, before anything was killed"
    return f"{where}, the first batch after resume {attempt}" if is_first else f"{where}, after resume {attempt}"


def _records(folder: Path, attempt: int, rank: int) -> dict[int, dict[str, Any]]:
    """By the number of the batch in all."""
    found = {}
    try:
        lines = (folder / f"attempt-{attempt:02d}-rank-{rank}.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        found[int(record["batch"])] = record
    return found
