"""The first difference between a killed and an undisturbed training, and its likely cause. Imports no torch.

Reads the traces of `faultbench/trace.py`. The inputs of a batch are compared in causal order, so that the first
difference is the cause: another order of the data changes the loss, not the reverse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from trainer.runs.directory import RunDirectory

KINDS = {
    "hash": (
        "the order of Python's sets and the hash of texts",
        "PYTHONHASHSEED differs: anything built from a set, such as a vocabulary, has another order in each process",
    ),
    "progress": (
        "the counters of epochs, batches and steps",
        "a hook or callback changes the progress of the loops, or a checkpoint was saved while they were incomplete",
    ),
    "data": (
        "the batch",
        "the data has another order or other values: a loader or sampler with its own order (implement "
        "state_dict and load_state_dict), an iterable dataset, or random transforms with their own generator",
    ),
    "frozen": (
        "which parameters are frozen",
        "a callback or hook freezes or unfreezes them at the start of an epoch, but not on a mid-epoch resume",
    ),
    "accumulation": (
        "the number of accumulated batches",
        "a callback sets it at the start of an epoch, but not on a mid-epoch resume",
    ),
    "parameters": (
        "the weights before the batch",
        "something changes them when training starts or a checkpoint is loaded (on_train_start, on_load_checkpoint, "
        "setup), or after the last checkpoint is saved",
    ),
    "buffers": (
        "a buffer",
        "a buffer that is not saved (persistent=False) and is written through `.data`, or is changed when training "
        "starts",
    ),
    "options": (
        "the optimizer's options",
        "a learning rate or another option is set by code that has lost its position after a resume: your own "
        "schedule, or a callback without state_dict",
    ),
    "optimizer": (
        "the optimizer's state",
        "the optimizer keeps state that its state_dict does not return, or is changed when training starts",
    ),
    "schedulers": (
        "a learning rate scheduler",
        "a scheduler was stepped once too often or too rarely, or keeps state that its state_dict does not return",
    ),
    "callbacks": (
        "the state of a callback",
        "its load_state_dict does not restore what its state_dict returned",
    ),
    "attributes": (
        "an attribute that is in no checkpoint",
        "save it: in state_dict and load_state_dict of a callback, in on_save_checkpoint and on_load_checkpoint of a "
        "module, or, for a number that the model uses, as a buffer (register_buffer)",
    ),
    "random": (
        "the random number generators",
        "something draws random numbers when training starts or resumes, after the generators were restored",
    ),
}
"""Inputs of a batch in causal order: the name, and the likely cause of a difference."""
_MAY_DIFFER = ("hash", "callbacks", "attributes")
"""Inputs that may differ between any two runs from the first batch on."""
_NOT_DETERMINISTIC = (
    "all inputs of the batch are equal, but its results are not: an operation is nondeterministic; try "
    "trainer.deterministic=true"
)


@dataclass(frozen=True)
class Diagnosis:
    """The first difference in the order of the batches."""

    where: str
    what: str
    reason: str
    also: str | None = None
    """Other differences at that place."""
    effect: str | None = None
    """The first step at which the weights or the loss differ, if it is later."""


def steps_per_epoch(run: RunDirectory) -> int | None:
    """Return the number of optimizer steps per epoch from the trace, or None if the loader has no length."""
    for record in _records(run, 0, 0).values():
        return None if record["steps_per_epoch"] is None else int(record["steps_per_epoch"])
    return None


def diagnose(killed: RunDirectory, undisturbed: RunDirectory) -> Diagnosis | None:
    """Return the first difference between the traces of two run directories, or None if they are equal."""
    ranks = sorted({int(path.stem.rpartition("-")[2]) for path in undisturbed.trace_path(0, 0).parent.glob("*.jsonl")})
    firsts = [one for rank in ranks if (one := _first(killed, undisturbed, rank)) is not None]
    return min(firsts, key=lambda one: one[0])[1] if firsts else None


def _first(killed: RunDirectory, undisturbed: RunDirectory, rank: int) -> tuple[tuple[int, int], Diagnosis] | None:
    """Return the first difference of one rank with its position, (attempt, batch)."""
    theirs = _records(undisturbed, 0, rank)
    ignored = _initial_differences(_records(killed, 0, rank), theirs)
    first: tuple[tuple[int, int], Diagnosis] | None = None
    for attempt in range(killed.next_attempt()):
        ours = _records(killed, attempt, rank)
        begins = min(ours, default=0)
        for batch in sorted(ours):
            if batch not in theirs:
                continue
            differences = _differences(ours[batch]["in"], theirs[batch]["in"], ignored)
            has_effect = ours[batch]["out"] != theirs[batch]["out"]
            if first is not None:
                if has_effect:
                    step = ours[batch]["step"]
                    position, diagnosis = first
                    return position, replace(diagnosis, effect=f"the weights or the loss differ from step {step} on")
                continue
            if not differences and not has_effect:
                continue
            where = _place(ours[batch], attempt, batch == begins, rank)
            if not differences:
                return (attempt, batch), Diagnosis(where, "the result", _NOT_DETERMINISTIC)
            (kind, what), *more = differences.items()
            diagnosis = Diagnosis(where, what, KINDS[kind][1], "; ".join(text for _, text in more) or None)
            if has_effect:
                return (attempt, batch), diagnosis
            first = (attempt, batch), diagnosis
    return first


def _initial_differences(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> set[tuple[str, str]]:
    """Return the inputs that differ before the first kill, such as times and names of folders."""
    if 0 not in ours or 0 not in theirs:
        return set()
    mine, other = ours[0]["in"], theirs[0]["in"]
    return {(kind, name) for kind in _MAY_DIFFER for name in mine[kind] if mine[kind][name] != other[kind].get(name)}


def _differences(ours: dict[str, Any], theirs: dict[str, Any], ignored: set[tuple[str, str]]) -> dict[str, str]:
    """Return a description of the differences by kind, in causal order."""
    differences = {}
    for kind, (what, _) in KINDS.items():
        mine, other = ours[kind], theirs[kind]
        names = [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]
        texts = [
            _describe(kind, name, mine.get(name), other.get(name)) for name in names if (kind, name) not in ignored
        ]
        if texts:
            more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
            differences[kind] = f"{what}: {', '.join(texts[:3])}{more}"
    return differences


def _describe(kind: str, name: str, mine: Any, other: Any) -> str:
    """Return the name, with both values unless they are checksums."""
    if isinstance(mine, str) or isinstance(other, str) or kind in ("progress", "accumulation"):
        return f"{name} is {'not set' if mine is None else mine} instead of {'not set' if other is None else other}"
    return name


def _place(record: dict[str, Any], attempt: int, is_first: bool, rank: int) -> str:
    where = f"epoch {record['in']['progress']['epoch']}, step {record['step']}, rank {rank}"
    if attempt == 0:
        return f"{where}, before the first kill"
    return f"{where}, the first batch after resume {attempt}" if is_first else f"{where}, after resume {attempt}"


def _records(run: RunDirectory, attempt: int, rank: int) -> dict[int, dict[str, Any]]:
    """Return the records of a rank in an attempt by the total number of the batch."""
    records = {}
    try:
        lines = run.trace_path(attempt, rank).read_text().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # truncated by a kill
            continue
        records[int(record["batch"])] = record
    return records
