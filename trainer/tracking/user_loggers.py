"""User-defined loggers (section `logger`): the same on every rank, and one curve over all attempts of a run."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from trainer.config.instantiate import accepts, instantiate, locate
from trainer.runs.directory import RunDirectory
from trainer.runs.events import LoggerVersions

_VERSION = ("version", "run_id")


def build(
    section: Mapping[str, Any],
    run: RunDirectory,
    step: int,
    is_first: bool,
    group: torch.distributed.ProcessGroup | None,
) -> list[Logger]:
    """Build the loggers of `section`.

    The first rank decides the versions, which Lightning derives from existing folders, and the others take them. A
    later attempt takes those of the first. Collective, if `section` is not empty.

    Args:
        section: Name to node.
        run: The run directory.
        step: The optimizer step that the attempt resumes from.
        is_first: Whether this is the first rank.
        group: The CPU process group.
    """
    nodes = {name: node for name, node in section.items() if node}
    if not nodes:
        return []
    known = next((event.versions for event in run.events_of(LoggerVersions)), None)
    if is_first:
        loggers = {name: _make(name, node, run, step, (known or {}).get(name)) for name, node in nodes.items()}
        versions = {name: _settled(logger, step, known is not None) for name, logger in loggers.items()}
        if known is None:
            run.add_event(LoggerVersions(versions=versions))
    shared = [versions if is_first else None]
    if group is not None:
        torch.distributed.broadcast_object_list(shared, src=0, group=group)
    if not is_first:
        loggers = {name: _make(name, node, run, None, (shared[0] or {}).get(name)) for name, node in nodes.items()}
    return list(loggers.values())


def _make(name: str, node: Mapping[str, Any], run: RunDirectory, step: int | None, version: Any) -> Logger:
    """Build one logger, with the run directory as its folder if it takes one and none is set."""
    where = f"logger.{name}"
    target = locate(node["_target_"], f"{where}._target_")
    arguments = dict(node)
    if accepts(target, "save_dir") and arguments.get("save_dir") is None:
        arguments["save_dir"] = str(run.path)
    for key in _VERSION:
        if version is not None and accepts(target, key) and arguments.get(key) is None:
            arguments[key] = version
            break
    if version is not None and step is not None and isinstance(target, type) and issubclass(target, TensorBoardLogger):
        # TensorBoard then hides later steps that the previous attempt wrote.
        arguments.setdefault("purge_step", step + 1)
    logger: Logger = instantiate(arguments, where=where)
    return logger


def _settled(logger: Logger, step: int, continues: bool) -> Any:
    """Return the version of `logger` on the first rank, once its experiment is created."""
    if isinstance(logger, CSVLogger) and continues:
        _continue_csv(logger, step)
    elif hasattr(logger, "experiment"):
        _ = logger.experiment  # as Lightning does before training: some have a version only then
    version = logger.version
    return version if isinstance(version, int) or version is None else str(version)


def _continue_csv(logger: CSVLogger, step: int) -> None:
    """Keep the rows up to `step`: Lightning deletes the file when a version is used again."""
    path = Path(logger.log_dir, "metrics.csv")
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        kept = [row for row in rows if float(row.get("step", 0)) <= step]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that it deletes the file
        writer = logger.experiment
    writer.metrics.extend(kept)
    writer.save()


def at_steps(logger: Logger, step_of: Callable[[int | None], int]) -> Logger:
    """Return the same logger, with `step_of` applied to the steps that Lightning gives it."""
    log_metrics = logger.log_metrics

    def on_axis(metrics: Any, step: int | None = None, *more: Any, **named: Any) -> None:
        log_metrics(metrics, step_of(step), *more, **named)

    logger.log_metrics = on_axis  # type: ignore[method-assign]
    return logger
