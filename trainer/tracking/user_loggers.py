"""User-defined loggers (section `logger`): the same on every rank, and one curve over all attempts of a run.

How a logger is continued depends on what its tracker allows:

- Files are cut to what they held at the checkpoint (`rewinding.py`): CSV, TensorBoard.
- A server gets no step twice (`sent.py`): MLflow, trackio.
- Any other logger gets the version or the run id of the first attempt, if its class takes one. If it has a method
  `rewind(step)`, that is called with the step from which the attempt resumes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from trainer.config.instantiate import accepts, instantiate, locate
from trainer.core.secrets import mask
from trainer.core.text import one_line
from trainer.runs.directory import RunDirectory
from trainer.runs.events import LoggerFailed, LoggerVersions
from trainer.tracking import mlflow_run, rewinding
from trainer.tracking.trackio_logger import TrackioLogger
from trainer.tracking.weights_and_biases import masked

_VERSION = ("version", "run_id", "experiment_key")
"""Arguments by which a logger continues what it logged before."""
_SERVERS = (MLFlowLogger, TrackioLogger)


def build(
    section: Mapping[str, Any],
    run: RunDirectory,
    step: int,
    is_first: bool,
    group: torch.distributed.ProcessGroup | None,
) -> list[Logger]:
    """Build the loggers of `section`.

    The first rank decides the versions, which Lightning derives from existing folders, and the others take them. A
    later attempt takes those of the first. A tracker whose server does not answer is left out on every rank.
    Collective, if `section` is not empty.

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
    known = _known_versions(run)
    shared: list[Any] = [None]
    if is_first:
        started = {name: _started(name, node, run, step, known) for name, node in nodes.items()}
        loggers = {name: logger for name, logger in started.items() if logger is not None}
        versions = {name: _version_of(logger) for name, logger in loggers.items()}
        if versions.keys() - known.keys():
            run.add_event(LoggerVersions(versions={**known, **versions}))
        shared = [versions]
    if group is not None:
        torch.distributed.broadcast_object_list(shared, src=0, group=group)
    if not is_first:
        versions = known if shared[0] is None else shared[0]
        loggers = {name: _make(name, nodes[name], run, versions[name]) for name in nodes if name in versions}
    return list(loggers.values())


def _known_versions(run: RunDirectory) -> dict[str, Any]:
    """Return the versions that the loggers of this run have since the attempt that first had them."""
    known: dict[str, Any] = {}
    for event in run.events_of(LoggerVersions):
        known = {**event.versions, **known}
    return known


def _make(name: str, node: Mapping[str, Any], run: RunDirectory, version: Any, step: int | None = None) -> Logger:
    """Build one logger, with the run directory as its folder if it takes one and none is set."""
    where = f"logger.{name}"
    target = locate(node["_target_"], f"{where}._target_")
    arguments = dict(node)
    kind = target if isinstance(target, type) else object
    if issubclass(kind, MLFlowLogger):
        mlflow_run.defaults(run, arguments)
    if accepts(target, "save_dir") and arguments.get("save_dir") is None:
        arguments["save_dir"] = str(run.path)
    if issubclass(kind, TrackioLogger):
        arguments["name"] = arguments.get("name") or run.path.name
    for key in _VERSION:
        if version is not None and accepts(target, key) and arguments.get(key) is None:
            arguments[key] = version
            break
    if version is not None and step is not None and issubclass(kind, TensorBoardLogger):
        # A TensorBoard that is open while the run is resumed then forgets the later steps of the previous attempt.
        arguments.setdefault("purge_step", step + 1)
    logger: Logger = instantiate(arguments, where=where)
    if isinstance(logger, TrackioLogger):  # afterwards: the `_target_`s in there are no arguments to be built
        logger.config = {**masked(run.config()), **logger.config}
    return logger


def _started(
    name: str, node: Mapping[str, Any], run: RunDirectory, step: int, known: Mapping[str, Any]
) -> Logger | None:
    """Return a logger on the first rank once its experiment is created; None if its server does not answer."""
    logger = _make(name, node, run, known.get(name), step)
    has_earlier = name in known
    if has_earlier and isinstance(logger, TensorBoardLogger):
        if rewinding.is_in_run(run, logger) or node.get("version") is None:
            rewinding.rewind_tensorboard(logger, rewinding.position_at(run, logger, step))
        # The earlier attempt has logged it; it would be a second point of the curve.
        logger._default_hp_metric = logger._default_hp_metric and step == 0
    if has_earlier and isinstance(logger, CSVLogger):
        rewinding.rewind_csv(logger, rewinding.position_at(run, logger, step), step)
    try:
        if hasattr(type(logger), "experiment"):
            _ = logger.experiment  # type: ignore[attr-defined]  # as Lightning does before training
        _follow(logger, run, step, has_earlier)
    except Exception as error:
        if not isinstance(logger, _SERVERS):
            raise
        reason = one_line(mask(str(error)))[:500]
        print(f"{name}: {reason}; training without it: `trainer resume` sends what metrics.jsonl has", flush=True)
        run.add_event(LoggerFailed(logger=name, reason=reason))
        return None
    return logger


def _follow(logger: Logger, run: RunDirectory, step: int, has_earlier: bool) -> None:
    """Let a logger of a later attempt continue at `step`."""
    if isinstance(logger, MLFlowLogger):
        timeout_s = float(run.config()["tracking"].get("finish_timeout_s", 60))
        mlflow_run.follow(logger, run, step, timeout_s, None if has_earlier else masked(run.config()))
    elif isinstance(logger, TrackioLogger):
        logger.follow(run, step)
    elif has_earlier and callable(rewind := getattr(logger, "rewind", None)):
        rewind(step)


def _version_of(logger: Logger) -> str | int | None:
    version = logger.version
    return version if isinstance(version, int) or version is None else str(version)


def at_steps(logger: Logger, step_of: Callable[[int | None], int]) -> Logger:
    """Return the same logger, with `step_of` applied to the steps that Lightning gives it, and with secrets masked."""
    log_metrics, log_hyperparams = logger.log_metrics, logger.log_hyperparams

    def on_axis(metrics: Any, step: int | None = None, *more: Any, **named: Any) -> None:
        log_metrics(metrics, step_of(step), *more, **named)

    def without_secrets(params: Any, *more: Any, **named: Any) -> None:
        log_hyperparams(_masked(params), *more, **named)

    logger.log_metrics = on_axis  # type: ignore[method-assign]
    logger.log_hyperparams = without_secrets  # type: ignore[method-assign]
    return logger


def _masked(params: Any) -> Any:
    if isinstance(params, Namespace):
        return Namespace(**masked(vars(params)))
    return masked(dict(params)) if isinstance(params, Mapping) else params
