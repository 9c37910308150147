"""Whether two runs ended the same, bit for bit, and what the first difference is. Imports torch.

`python -m trainer.faultbench.compare` answers one line of JSON, {"ours", "theirs", "step"}, with another,
{"difference": text or null}, until its input ends: one import for many comparisons.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import Stored

CLOCK_KEYS = ("trained_s", "pytorch-lightning_version")
"""What two runs cannot have in common."""


def first_difference(ours: Path, theirs: Path, step: int) -> str | None:
    """Of the samples read, then of the checkpoints of `step`: weights, optimizer, RNG and the rest."""
    found = _difference(samples(ours), samples(theirs), "samples")
    if found:
        return found
    left, right = [Stored(CheckpointStore(run / "checkpoints").path(step)) for run in (ours, theirs)]
    for name, one, other in (
        ("", left.whole(), right.whole()),
        ("optimizer options", left.optimizers.groups, right.optimizers.groups),
        ("optimizer values", left.optimizers.values, right.optimizers.values),
        ("state", left.state, right.state),
    ):
        found = _difference(one, other, name)
        if found:
            return found
    return None


def samples(run: Path) -> dict[str, list[int]]:
    """`rank R, epoch E, step S` to the ids read, as the last attempt that read them did (callbacks=sample_log)."""
    found: dict[str, list[int]] = {}
    for path in sorted((run / "samples").glob("*.jsonl")):
        rank = int(path.stem.rpartition("-")[2])
        here: dict[str, list[int]] = {}
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            loader = f", loader {record['loader']}" if "loader" in record else ""
            where = f"rank {rank}, epoch {record['epoch']}, step {record['step']}{loader}"
            here.setdefault(where, []).extend(record["ids"])
        found.update(here)
    return found


def _difference(ours: Any, theirs: Any, where: str) -> str | None:
    """The first place at which two trees differ; None when they are equal."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return _of_tensors(ours, theirs, where)
    if type(ours) is not type(theirs):
        return f"{where}: {type(ours).__name__} and {type(theirs).__name__}"
    if isinstance(ours, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key in CLOCK_KEYS:
                continue
            inside = f"{where}/{key}" if where else str(key)
            if key not in ours or key not in theirs:
                return f"{inside}: only in one of the two"
            found = _difference(ours[key], theirs[key], inside)
            if found:
                return found
        return None
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return f"{where}: {len(ours)} and {len(theirs)} entries"
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((found for index, (a, b) in pairs if (found := _difference(a, b, f"{where}[{index}]"))), None)
    return None if ours == theirs or (ours != ours and theirs != theirs) else f"{where}: {ours!r} and {theirs!r}"


def _of_tensors(ours: torch.Tensor, theirs: torch.Tensor, where: str) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{where}: {tuple(ours.shape)} {ours.dtype} and {tuple(theirs.shape)} {theirs.dtype}"
    if torch.equal(ours, theirs) or torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        return None
    differ = int((ours != theirs).sum())
    largest = float((ours.double() - theirs.double()).abs().max())
    return f"{where}: {differ} of {ours.numel()} numbers differ, by up to {largest:.3g}"


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = first_difference(Path(asked["ours"]), Path(asked["theirs"]), asked["step"])
        except Exception as error:  # the answer, not the end of the others
            found = f"{type(error).__name__}: {error}"
        print(json.dumps({"difference": found}), flush=True)


if __name__ == "__main__":
    main()
