"""The output of `trainer ls`: cells of its table, CSV, Parquet."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from trainer.cli.common import age, duration, number
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.install import pip_install
from trainer.core.text import one_line
from trainer.runs.columns import COLUMNS, TIMES, differing, metrics_of, value_of
from trainer.runs.row import Row

_LARGEST = 2**63
"""Larger integers are written as text: a column of numbers has 64 bits."""
_SPECIAL = ("nan", "inf", "-inf")
DEFAULT = ("id", "name", "state", "step", "best", "age", "strategy", "where")


def _step(row: Row) -> str:
    step, limit = row.facts["step"], row.facts["max_steps"]
    return "" if step is None else f"{step}/{limit}" if limit else str(step)


def _best(row: Row) -> str:
    best = row.facts["best"]
    return f"{best['metric']} {number(best['value'])}" if best else ""


def _strategy(row: Row) -> str:
    size = row.facts["world_size"]
    return f"{row.facts['strategy']} x{size}" if size else str(row.facts["strategy"])


_CELLS: dict[str, Callable[[Row], str]] = {
    "step": _step,
    "best": _best,
    "age": lambda row: age(row.facts["created"]),
    "strategy": _strategy,
    "wall_s": lambda row: "" if (value := value_of(row, "wall_s")) is None else duration(value),
    **{name: lambda row, name=name: age(value_of(row, name)) for name in TIMES},  # type: ignore[misc]
}
"""Columns whose cell is not just their value."""


def header(key: str) -> str:
    """Return the title of a column: columns of every run in capitals, metrics and keys as they are."""
    return one_line(key.upper() if key in COLUMNS else key)


def cell(row: Row, key: str) -> str:
    """Return the text of a cell of the table."""
    if key in _CELLS:
        return _CELLS[key](row)
    value = value_of(row, key)
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def all_columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of a file: those of every run, all metrics, and the keys of the configuration that differ."""
    return list(dict.fromkeys([*COLUMNS, *metrics_of(rows), *differing(rows)]))


def write_csv(rows: Sequence[Row], keys: Sequence[str], file: TextIO) -> None:
    """Write one line per run. Lists are JSON; control characters are escaped."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(one_line, keys))
    writer.writerows([_plain(value_of(row, key)) for key in keys] for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False)
    return one_line(value) if isinstance(value, str) else value


def write_parquet(rows: Sequence[Row], keys: Sequence[str], path: Path) -> None:
    """Write one row per run. A column is of numbers if all its values are, else of texts.

    Raises:
        EnvironmentFault: pyarrow is not installed, or the file cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise EnvironmentFault("--parquet needs pyarrow", f"{pip_install('datasets')}, or use --csv") from None
    table = pyarrow.table({key: _column([value_of(row, key) for row in rows]) for key in keys})
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                parquet.write_table(table, file)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror}", "name another file") from None


def _column(values: list[Any]) -> list[Any]:
    """Return values of one type: integers, numbers, truth values, or texts."""
    known = [value for value in values if value is not None]
    if all(type(value) is bool for value in known):
        return values
    if all(type(value) is int and abs(value) < _LARGEST for value in known):
        return values
    if all(
        type(value) is float
        or (type(value) is int and abs(value) < _LARGEST)
        or (isinstance(value, str) and value in _SPECIAL)
        for value in known
    ):
        return [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def split_columns(text: str) -> list[str]:
    """Return the columns of `--columns`: names separated by commas; with a leading `+`, in addition to the default.

    Raises:
        UserError: There is none.
    """
    names = [name.strip() for name in text.removeprefix("+").split(",") if name.strip()]
    if not names:
        raise UserError("--columns names no column", f"such as --columns {','.join(DEFAULT)}, or --columns +val/acc")
    return list(dict.fromkeys([*DEFAULT, *names] if text.startswith("+") else names))
