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

MAX_CLASSES = 2**24
"""Maximum number of integer classes: the last layer of the model has an output for each."""


@dataclass(frozen=True)
class Labels:
    """The classes, and the label of each row of the splits that have labels."""

    classes: list[str]
    """Names of the classes."""
    numbers: dict[str, numpy.ndarray]
    """Split to the class of each row, int64 of shape `(rows,)`; `IGNORED` where a row has none."""
    ends: dict[str, numpy.ndarray]
    """Split to the number of rows up to the end of each of its files."""


def read_labels(tables: Tables, column: str) -> Labels:
    """Read the labels of all splits. A split without any label is skipped, with a warning.

    Raises:
        UserError: The training split has no labels.
    """
    values = {split: _values(paths, column, tables.max_bytes) for split, paths in tables.files.items()}
    classes = tables.class_names(column) or _classes(values["train"][0])
    numbers = {split: _numbers(labels, classes) for split, (labels, _) in values.items()}
    if not (numbers["train"] != IGNORED).any():
        fix = "name the column of the classes: data.label_column=NAME"
        raise UserError(f"data.root={tables.root}: column {column} has no labels in the training split", fix)
    # Published test sets often come without labels.
    given = {split: labels for split, labels in numbers.items() if (labels != IGNORED).any()}
    for split in set(numbers) - set(given):
        _log.warning("%s has no labels in column %s: skipped", split, column)
    return Labels(classes, given, {split: values[split][1] for split in given})


def refuse_too_many(split: str, bad: int, names: Sequence[str], max_bad: int) -> None:
    """Log the rows whose label is none of the classes, and raise UserError if there are too many.

    Args:
        split: Name of the split.
        bad: Number of such rows.
        names: Names of the first of them.
        max_bad: Number of such rows that are tolerated.
    """
    if not bad:
        return
    _log.warning("%s: %d rows have no usable label: %s", split, bad, ", ".join(names[:20]))
    if bad > max_bad:
        problem = f"{split}: {bad} rows have a label that is none of the classes; the first is {names[0]}"
        raise UserError(problem, "repair them, or increase data.max_bad")


def _values(paths: Sequence[Path], column: str, max_bytes: int | None) -> tuple[list[Any], numpy.ndarray]:
    """Return the labels as written, and the number of rows up to the end of each file."""
    values: list[Any] = []
    ends = []
    for path in paths:
        for _, _, chunk in column_of([path], column, max_bytes):
            values += chunk.to_pylist()
        ends.append(len(values))
    return values, numpy.array(ends)


def _classes(values: Sequence[Any]) -> list[str]:
    """Return the class names: 0 to the largest for integers, the sorted values for texts."""
    known = [value for value in values if value is not None]
    kinds = {type(value) for value in known}
    if kinds <= {int, bool}:
        largest = max(map(int, known), default=-1)
        if largest >= MAX_CLASSES:
            fix = "name a column of integers from 0, or of texts"
            raise UserError(f"data.label_column: the class {largest} would make a model with as many outputs", fix)
        return [str(number) for number in range(1 + largest)]
    if kinds == {str}:
        return sorted(set(known))
    raise UserError(
        f"data.label_column: expected classes, got {', '.join(sorted(kind.__name__ for kind in kinds))}",
        "name a column of integers from 0, or of texts",
    )


def _numbers(values: Sequence[Any], classes: Sequence[str]) -> numpy.ndarray:
    """Return the class of each row, int64 of shape `(rows,)`; `IGNORED` if it is none of them."""
    by_name = {name: number for number, name in enumerate(classes)}
    numbers = numpy.full(len(values), IGNORED, numpy.int64)
    for index, value in enumerate(values):
        if isinstance(value, str):
            numbers[index] = by_name.get(value, IGNORED)
        elif isinstance(value, int) and 0 <= value < len(classes):
            numbers[index] = value
    return numbers
