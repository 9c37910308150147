"""Read from a run how a trial went: its values, and what it cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.direction import direction_of
from trainer.core.files import parse_json, read_bytes
from trainer.core.records import BadRecord
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import ledger
from trainer.runs.records import AttemptOutcome
from trainer.runs.summary import best as best_of_run
from trainer.sweeps.records import Direction, Result, ResultState, Spec

_MOST_BYTES = 1024**3


@dataclass(frozen=True)
class Objective:
    """The value of a trial: the best of a metric over its validations."""

    metric: str
    mode: Literal["min", "max"]
    values: list[float]
    step: int


def final_outcome(run: RunDirectory, first_attempt: int) -> AttemptOutcome | None:
    """Return the recorded end of a run since an attempt; None while it has none, or was restarted."""
    outcomes = [one for one in run.attempts() if one.attempt >= first_attempt]
    newest = outcomes[-1] if outcomes else None
    return None if newest is None or newest.restarted else newest


def history(run: RunDirectory, metric: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of `metrics.jsonl` with this metric, in order; values are finite."""
    try:
        text = read_bytes(run.metrics_path, _MOST_BYTES).decode(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        if metric not in line:
            continue
        try:
            parsed = parse_json(line)
            step, value = int(parsed["step"]), float(parsed[metric])
        except (ValueError, KeyError, TypeError, OverflowError):  # cut short by a crash, or an infinite step
            continue
        if math.isfinite(value):
            found.append((step, value))
    return found


def mode_of(spec: Spec, index: int) -> Literal["min", "max"]:
    """Return whether lower or higher values of a metric of the spec are better."""
    if index < len(spec.direction):
        return "max" if spec.direction[index] == "maximize" else "min"
    return direction_of(spec.metric[index]) or "min"


def directions_of(spec: Spec, fallback: Literal["min", "max"] | None) -> list[Direction]:
    """Return the direction of each metric; `fallback` is that of the best checkpoints."""
    modes = [mode_of(spec, index) for index in range(len(spec.metric))] or [fallback or "min"]
    return ["maximize" if mode == "max" else "minimize" for mode in modes]


def objective(run: RunDirectory, spec: Spec) -> Objective | None:
    """Return the best value of each metric so far; None if one of them was not logged."""
    if not spec.metric:
        best = best_of_run(run, run.heartbeat(0))
        if best is None or best.metric is None:
            return None
        seen = history(run, best.metric)  # a save may have come after a better validation
        step, value = _best(seen, best.mode) if seen else (best.step, best.value)
        return Objective(best.metric, best.mode, [value], step)
    found = []
    for index, metric in enumerate(spec.metric):
        seen = history(run, metric)
        if not seen:
            return None
        found.append(_best(seen, mode_of(spec, index)))
    return Objective(spec.metric[0], mode_of(spec, 0), [value for _, value in found], found[0][0])


def _best(seen: list[tuple[int, float]], mode: str) -> tuple[int, float]:
    return (max if mode == "max" else min)(seen, key=lambda one: one[1])


def result_of(
    run: RunDirectory | None, spec: Spec, state: ResultState, reason: str, where: str | None = None
) -> Result:
    """Return the result of a trial whose run has ended in this state."""
    if run is None or not run.exists():
        return Result(state=state, reason=reason, run=str(run.path) if run else None, time=time.time())
    found = objective(run, spec)
    hours = _hours(run)
    gpu_hours = hours * spec.gpus
    return Result(
        state=state,
        values=found.values if found else None,
        metric=found.metric if found else None,
        mode=found.mode if found else None,
        step=found.step if found else None,
        reason=reason,
        where=where,
        run=str(run.path),
        gpu_hours=gpu_hours,
        hours=hours,
        cost=_cost(run, spec, hours),
        time=time.time(),
    )


def spent(run: RunDirectory, spec: Spec) -> tuple[float, float]:
    """Return the GPU hours and the cost of a run so far; without prices the cost is 0."""
    if not run.exists():
        return 0.0, 0.0
    hours = _hours(run)
    return hours * spec.gpus, _cost(run, spec, hours) or 0.0


def _hours(run: RunDirectory) -> float:
    """Return the hours of allocated time, without the queue and the time between attempts."""
    account = ledger(run)
    if account is None:
        return 0.0
    seconds = account["seconds"]
    return float(sum(value for name, value in seconds.items() if name not in ("queue", "down"))) / 3600


def _cost(run: RunDirectory, spec: Spec, hours: float) -> float | None:
    """Return the cost by the prices in `cluster`; None without them."""
    cluster: Any = run.config().get("cluster")
    prices = cluster if isinstance(cluster, dict) else {}
    price = prices.get("price_per_gpu_hour") if spec.gpus else prices.get("price_per_cpu_core_hour")
    return None if price is None else hours * (spec.gpus or spec.world_size) * float(price)


def open_run(path: str) -> RunDirectory:
    """Return the run of a trial.

    Raises:
        BadRecord: Something else than a run's folder could be meant.
    """
    from pathlib import Path

    if not Path(path).is_absolute():
        raise BadRecord(f"{path} is not the path of a run", "remove the sweep", source=path)
    return RunDirectory(Path(path))
