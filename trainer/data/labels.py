"""A column of labels in tables on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from trainer.core.errors import UserError
from trainer.data.tables import Tables, column_of
from trainer.tasks.classification import IGNORED

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """`classes`: names. Of each split that has labels: `numbers`, (n,) int64, the class of each row, `IGNORED` where it
    is none; `ends`, the number of the row behind each file's last."""

    classes: list[str]
    numbers: dict[str, numpy.ndarray]
    ends: dict[str, numpy.ndarray]


def read_labels(tables: Tables, column: str) -> Labels:
    """Raises UserError where there is nothing to train on. A split without any label is left out, with a warning."""
    values = {split: _values(paths, column) for split, paths in tables.files.items()}
    classes = tables.class_names(column) or _classes(values["train"][0])
    numbers = {split: _numbers(one, classes) for split, (one, _) in values.items()}
    if not (numbers["train"] != IGNORED).any():
        fix = "name the column of the classes: data.label_column=NAME"
        raise UserError(f"data.root={tables.root}: column {column} holds no labels to train on", fix)
    # Published test sets often come without labels.
    given = {split: one for split, one in numbers.items() if (one != IGNORED).any()}
    for split in set(numbers) - set(given):
        _log.warning("%s has no labels in column %s: left out", split, column)
    return Labels(classes, given, {split: values[split][1] for split in given})


def refuse_too_many(split: str, bad: int, names: Sequence[str], max_bad: int) -> None:
    """`bad`: number of rows whose label is none of the classes; `names`: of the first of them, which go into the log.
    Raises UserError."""
    if not bad:
        return
    _log.warning("%s: %d rows have no usable label: %s", split, bad, ", ".join(names[:20]))
    if bad > max_bad:
        problem = f"{split}: {bad} rows have no label that is one of the classes, the first {names[0]}"
        raise UserError(problem, "mend them, or raise data.max_bad")


def _values(paths: Sequence[Path], column: str) -> tuple[list[Any], numpy.ndarray]:
    """The labels as they are written, and the number of the row behind each file's last."""
    values: list[Any] = []
    ends = []
    for path in paths:
        for _, _, chunk in column_of([path], column):
            values += chunk.to_pylist()
        ends.append(len(values))
    return values, numpy.array(ends)


def _classes(values: Sequence[Any]) -> list[str]:
    """Of integers, 0 to the largest; of texts, those that there are, sorted."""
    known = [value for value in values if value is not None]
    kinds = {type(value) for value in known}
    if kinds <= {int, bool}:
        return [str(number) for number in range(1 + max(map(int, known), default=-1))]
    if kinds == {str}:
        return sorted(set(known))
    raise UserError(
        f"data.label_column holds {', '.join(sorted(kind.__name__ for kind in kinds))}, not classes",
        "name a column of integers from 0, or of texts",
    )


def _numbers(values: Sequence[Any], classes: Sequence[str]) -> numpy.ndarray:
    """(n,) int64: the class of each row, `IGNORED` where it is none of them."""
    by_name = {name: number for number, name in enumerate(classes)}
    found = numpy.full(len(values), IGNORED, numpy.int64)
    for index, value in enumerate(values):
        if isinstance(value, str):
            found[index] = by_name.get(value, IGNORED)
        elif isinstance(value, int) and 0 <= value < len(classes):
            found[index] = value
    return found
