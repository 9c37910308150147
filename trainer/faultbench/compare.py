"""Bit for bit comparison of the final states of two runs. Imports torch.

`python -m trainer.faultbench.compare` answers each line, a `Comparison` as JSON, with a `Difference`, until its input
ends, so that torch is imported once for many comparisons.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.core import records
from trainer.faultbench.messages import Comparison, Difference

CLOCK_KEYS = ("trained_s", "pytorch-lightning_version")
"""Keys that differ between any two runs."""


def first_difference(ours: Path, theirs: Path, step: int) -> str | None:
    """Return the first difference of two runs, or None if they are equal.

    Compares the samples that were read, then the checkpoints of `step`: weights, optimizer, RNG states and the rest.
    """
    difference = _difference(samples(ours), samples(theirs), "samples")
    if difference:
        return difference
    left, right = [StoredCheckpoint(CheckpointStore(run / "checkpoints").path(step)) for run in (ours, theirs)]
    for name, one, other in (
        ("", left.whole(), right.whole()),
        ("optimizer options", left.optimizers.groups, right.optimizers.groups),
        ("optimizer values", left.optimizers.values, right.optimizers.values),
        ("state", left.state, right.state),
    ):
        difference = _difference(one, other, name)
        if difference:
            return difference
    return None


def samples(run: Path) -> dict[str, list[int]]:
    """Return the sample ids by `rank R, epoch E, step S`, as the last attempt read them (callbacks=sample_log)."""
    ids: dict[str, list[int]] = {}
    for path in sorted((run / "samples").glob("*.jsonl")):
        rank = int(path.stem.rpartition("-")[2])
        in_attempt: dict[str, list[int]] = {}
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # truncated by a kill
                continue
            loader = f", loader {record['loader']}" if "loader" in record else ""
            where = f"rank {rank}, epoch {record['epoch']}, step {record['step']}{loader}"
            in_attempt.setdefault(where, []).extend(record["ids"])
        ids.update(in_attempt)
    return ids


def _difference(ours: Any, theirs: Any, where: str) -> str | None:
    """Return the first place at which two trees differ, or None if they are equal."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return _tensor_difference(ours, theirs, where)
    if type(ours) is not type(theirs):
        return f"{where}: {type(ours).__name__} and {type(theirs).__name__}"
    if isinstance(ours, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key in CLOCK_KEYS:
                continue
            inside = f"{where}/{key}" if where else str(key)
            if key not in ours or key not in theirs:
                return f"{inside}: only in one of the two"
            difference = _difference(ours[key], theirs[key], inside)
            if difference:
                return difference
        return None
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return f"{where}: {len(ours)} and {len(theirs)} entries"
        pairs = enumerate(zip(ours, theirs, strict=True))
        differences = (_difference(a, b, f"{where}[{index}]") for index, (a, b) in pairs)
        return next(filter(None, differences), None)
    return None if ours == theirs or (ours != ours and theirs != theirs) else f"{where}: {ours!r} and {theirs!r}"


def _tensor_difference(ours: torch.Tensor, theirs: torch.Tensor, where: str) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{where}: {tuple(ours.shape)} {ours.dtype} and {tuple(theirs.shape)} {theirs.dtype}"
    if torch.equal(ours, theirs) or torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        return None
    differ = int((ours != theirs).sum())
    largest = float((ours.double() - theirs.double()).abs().max())
    return f"{where}: {differ} of {ours.numel()} elements differ, by up to {largest:.3g}"


def main() -> None:
    """Answer the requests on stdin."""
    for line in sys.stdin:
        difference: str | None
        try:
            request = records.loads(Comparison, line, "the request")
            difference = first_difference(Path(request.ours), Path(request.theirs), request.step)
        except Exception as error:  # later requests are still answered
            difference = f"{type(error).__name__}: {error}"
        print(records.dumps(Difference(difference=difference)), flush=True)


if __name__ == "__main__":
    main()
