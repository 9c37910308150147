"""Held-out rows of a table, for each split that no file gives: always the same, independent of the run's seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data.files import SPLITS
from trainer.data.randomness import uniform


def rows_of_splits(counts: Mapping[str, int], held_out: float) -> dict[str, tuple[str, numpy.ndarray]]:
    """Choose the rows of each split.

    Each of val and test that is not given gets `held_out` of the rows of train, by the hash of their numbers: added
    rows do not move the others.

    Args:
        counts: Rows of the splits that are given, including `train`.
        held_out: Fraction of the rows of train for each of val and test that is not given.

    Returns:
        Split to the given split that its rows are in, and their sorted row numbers there.

    Raises:
        UserError: No training rows are left.
    """
    rows = {split: (split, numpy.arange(count)) for split, count in counts.items()}
    missing = [split for split in SPLITS if split not in counts]
    if not missing:
        return rows
    points = uniform(0, 0, torch.arange(counts["train"]), 1)[:, 0].numpy()
    ranked = points.argsort()
    tests = max(1, int((points < held_out).sum()))
    vals = max(1, int(((held_out <= points) & (points < 2 * held_out)).sum()))
    if tests + vals >= len(ranked):
        fix = "use a smaller data.held_out, or give files for val and test"
        raise UserError(f"data.held_out={held_out} of {len(ranked)} rows leaves no training data", fix)
    parts = {"test": ranked[:tests], "val": ranked[tests : tests + vals]}
    taken = numpy.concatenate([parts[split] for split in missing])
    rows["train"] = ("train", numpy.setdiff1d(numpy.arange(len(ranked)), taken))
    return {**rows, **{split: ("train", numpy.sort(parts[split])) for split in missing}}
