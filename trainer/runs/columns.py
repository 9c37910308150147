"""Values of a run by a key: a column of `trainer ls`, a metric, or a key of the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trainer.config.direction import direction_of
from trainer.core.errors import UserError
from trainer.core.near import listed, nearest
from trainer.runs.facts import mapping
from trainer.runs.row import Row

ENDINGS = (".min", ".max", ".best")
"""`val/loss.min` is the lowest value of the metric, `.best` the one that is better by its name or `checkpoint.mode`."""


def _fact(name: str) -> Callable[[Row], Any]:
    return lambda row: row.facts.get(name)


def _best(name: str) -> Callable[[Row], Any]:
    return lambda row: mapping(row.facts["best"]).get(name)


def _ledger(name: str) -> Callable[[Row], Any]:
    return lambda row: mapping(row.facts["ledger"]).get(name)


def _where(row: Row) -> str:
    job = row.facts["slurm_job_id"]
    return f"slurm {job}" if job else str(row.facts["cluster"])


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "id": lambda row: row.id,
    "name": lambda row: row.name,
    "path": lambda row: row.folder,
    **{name: _fact(name) for name in ("state", "reason", "step", "max_steps", "epoch")},
    "best": _best("value"),
    "best_metric": _best("metric"),
    "best_step": _best("step"),
    "age": lambda row: time.time() - row.facts["created"],
    **{name: _fact(name) for name in ("created", "started", "ended", "attempts", "strategy", "world_size", "cluster")},
    "where": _where,
    **{name: _fact(name) for name in ("slurm_job_id", "wandb_id", "tags", "energy_kwh", "cost")},
    **{name: _ledger(name) for name in ("wall_s", "effective", "goodput")},
}
"""The columns that every run has, whatever it trains. A value that is not known is None."""
TIMES = ("created", "started", "ended")
"""Columns in seconds since 1970."""


def value_of(row: Row, key: str) -> Any:
    """Return the value of a column, a metric (its last value), an evaluation or a key of the configuration, or None."""
    if key in COLUMNS:
        return COLUMNS[key](row)
    if key in row.metrics:
        return row.metrics[key]
    base, ending = _split(key)
    if ending:
        return _extreme(row, base, ending)
    evaluated = [one["metrics"][key] for one in row.facts["evaluations"] if key in mapping(one.get("metrics"))]
    return evaluated[-1] if evaluated else row.config.get(key)


def _extreme(row: Row, metric: str, ending: str) -> float | None:
    found = row.ranges.get(metric)
    mode = ending[1:] if ending != ".best" else mode_of(row, metric)
    best = found.best(mode) if found is not None and mode is not None else None
    return None if best is None else best[0]


def mode_of(row: Row, metric: str) -> str | None:
    """Return `min` or `max`: the direction that the run used for its monitored metric, else that of the name."""
    best = mapping(row.facts["best"])
    if best.get("metric") == metric and best.get("mode") in ("min", "max"):
        return str(best["mode"])
    if row.config.get("checkpoint.monitor") == metric and row.config.get("checkpoint.mode") in ("min", "max"):
        return str(row.config["checkpoint.mode"])
    return direction_of(metric)


def has(row: Row, key: str) -> bool:
    """Return whether the run has this key, whatever its value."""
    if key in COLUMNS or key in row.metrics or _split(key)[0] in row.metrics:
        return True
    return any(key in mapping(one.get("metrics")) for one in row.facts["evaluations"]) or key in row.config


def is_metric(rows: Iterable[Row], key: str) -> bool:
    """Return whether a run has logged this metric, or evaluated it."""
    name = _split(key)[0]
    return any(
        name in row.metrics or any(name in mapping(one.get("metrics")) for one in row.facts["evaluations"])
        for row in rows
    )


def require_keys(keys: Iterable[str], rows: Sequence[Row], option: str) -> None:
    """Check that each key is one of a column, or of a run; without runs, that a run could have it.

    Raises:
        UserError: No run has it; with the names that are near.
    """
    for key in keys:
        if key in COLUMNS or (any(has(row, key) for row in rows) if rows else _could_have(key)):
            continue
        known = known_keys(rows) if rows else [*COLUMNS, *_keys_of_schema()]
        same_end = [name for name in known if name.rpartition(".")[2] == key or name.rpartition("/")[2] == key]
        near = nearest(key, known)
        suggested = listed(same_end, 5) if same_end else near
        hint = f"did you mean {suggested}? " if suggested else ""
        raise UserError(
            f"{option}: no run has {key}",
            f"{hint}use a column ({', '.join(COLUMNS)}), a metric as it was logged, or a key of the configuration",
        )


def _could_have(key: str) -> bool:
    """Return whether a run may have this key: a metric such as val/loss, a group, or a key that a section may have."""
    from trainer.config.typed import is_closed
    from trainer.core.paths import conf_dir

    section, dot, _ = key.partition(".")
    if "/" in key or key in _keys_of_schema() or (not dot and (conf_dir() / key).is_dir()):
        return True
    return bool(dot) and section in {one.partition(".")[0] for one in _keys_of_schema()} and not is_closed(section)


def _keys_of_schema() -> list[str]:
    """Return the sections, and the keys of those that are closed in every job."""
    from trainer.config.schema import Config
    from trainer.config.typed import CHOSEN, closed_class, key_names

    keys: list[str] = []
    for section in key_names(Config):
        classes = list(CHOSEN[section].values()) if section in CHOSEN else [closed_class(section, {})]
        keys += [section, *(f"{section}.{name}" for one in classes if one is not None for name in key_names(one))]
    return keys


def known_keys(rows: Iterable[Row]) -> list[str]:
    """Return every column, metric and key of the configuration, in this order."""
    rows = list(rows)
    return list(dict.fromkeys([*COLUMNS, *metrics_of(rows), *(key for row in rows for key in row.config)]))


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of the metrics that any run has logged or evaluated, sorted."""
    names: set[str] = set()
    for row in rows:
        names.update(row.metrics)
        names.update(name for one in row.facts["evaluations"] for name in mapping(one.get("metrics")))
    return sorted(names)


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the keys of the configuration whose values are not equal in all runs, in the order of the first run."""
    keys = dict.fromkeys(key for row in rows for key in row.config)
    return [key for key in keys if len({repr(row.config.get(key, KeyError)) for row in rows}) > 1]


def ordered(rows: Iterable[Row], key: str) -> list[Row]:
    """Sort rows by a key: metrics by the better value where it is known which that is, else ascending.

    Numbers come before texts, and runs without a value last.
    """
    rows = list(rows)
    best_first = {id(row): mode_of(row, _split(key)[0]) == "max" for row in rows} if is_metric(rows, key) else {}

    def place(row: Row) -> tuple[int, float, str]:
        value = value_of(row, key)
        number = as_number(value)
        if number is not None and number == number:
            return 0, -number if best_first.get(id(row)) else number, ""
        return (2, 0.0, "") if value is None or number is not None else (1, 0.0, str(value))

    return sorted(rows, key=place)


def as_number(value: Any) -> float | None:
    """Return a number, also one that is written as text such as `inf`; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _split(key: str) -> tuple[str, str]:
    """Return the metric and the ending of `val/loss.min`; without one of `ENDINGS` the key and an empty text."""
    ending = next((one for one in ENDINGS if key.endswith(one)), "")
    return (key.removesuffix(ending), ending) if ending else (key, "")
