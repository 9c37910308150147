"""MLflow: one MLflow run per run, no step twice, and a server that fails does not fail the training.

Facts about the client (3.17) and Lightning's MLFlowLogger that this file relies on:

- Each call of `log_batch` waits for the server. By default the client tries again for about 4 minutes.
- A metric may have several values at a step, and the API deletes none.
- `log_batch` refuses to change the value of a parameter.
- A run that was terminated takes metrics, and keeps its status until it is changed.
- Without a server it writes files only if MLFLOW_ALLOW_FILE_STORE is set.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor

from trainer.runs.directory import RunDirectory
from trainer.tracking.sender import Sender
from trainer.tracking.sent import SentSteps

_HTTP = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_UNFIT = re.compile(r"[^a-zA-Z0-9_/. -]+")
"""Characters that MLFlowLogger removes from the name of a metric."""
_TRY_AGAIN = (408, 429)


def defaults(run: RunDirectory, arguments: dict[str, Any]) -> None:
    """Fill the arguments of an MLFlowLogger that are null: the name of the run, and a folder if there is no server."""
    for name, value in _HTTP.items():
        os.environ.setdefault(name, value)
    if arguments.get("run_name") is None:
        arguments["run_name"] = run.path.name
    if not arguments.get("tracking_uri"):
        arguments["tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI") or None
    if arguments.get("save_dir") is None:
        arguments["save_dir"] = str(run.path / "mlruns")
    if not arguments["tracking_uri"]:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def follow(
    logger: MLFlowLogger,
    run: RunDirectory,
    step: int,
    timeout_s: float,
    config: Mapping[str, Any] | None,
) -> None:
    """Let a logger whose MLflow run exists send from a thread, and what the server lacks only.

    Args:
        logger: The logger, on the first rank.
        run: The run directory.
        step: The step from which the attempt resumes.
        timeout_s: Seconds that the end of the training may wait for the server.
        config: The configuration to log as parameters, in the first attempt; else None.
    """
    client, run_id = logger.experiment, logger.run_id
    data = client.get_run(run_id).data
    sent = SentSteps({metric.key: metric.step for metric in data._metric_objs})
    parameters = dict(data.params)
    sender = Sender("mlflow", _is_refusal, timeout_s)
    log_metrics, log_hyperparams, finalize = logger.log_metrics, logger.log_hyperparams, logger.finalize

    def send_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {_name(logger, name): _plain(value) for name, value in metrics.items()}
        new = sent.new(values, step or 0)
        given = {name: _plain(metrics[name]) for name in metrics if _name(logger, name) in new}
        if given:
            sender.put(lambda: log_metrics(given, step))

    def send_parameters(params: dict[str, Any] | Namespace) -> None:
        flat = {str(name): value for name, value in _flatten_dict(_convert_params(params)).items()}
        changed = sorted(name for name in flat if parameters.get(name, str(flat[name])[:250]) != str(flat[name])[:250])
        if changed:
            print(f"mlflow: keeps the first value of {', '.join(changed)}: parameters cannot change", flush=True)
        new = {name: value for name, value in flat.items() if name not in parameters}
        parameters.update({name: str(value)[:250] for name, value in new.items()})
        if new:
            sender.put(lambda: log_hyperparams(new))

    def end(status: str = "success") -> None:
        sender.put(lambda: finalize(status))
        sender.close()

    logger.log_metrics, logger.log_hyperparams = send_metrics, send_parameters  # type: ignore[method-assign]
    logger.finalize = end  # type: ignore[method-assign]
    if config is not None:
        send_parameters({"config": dict(config)})
    elif step or data._metric_objs:
        sender.put(lambda: client.update_run(run_id, status="RUNNING"))
    if step:
        for at, metrics in sent.missing(run.metrics_path, step):
            sender.put(_later(log_metrics, metrics, at))


def _later(log: Callable[..., None], metrics: Mapping[str, Any], step: int) -> Callable[[], None]:
    return lambda: log(metrics, step)


def _name(logger: MLFlowLogger, name: str) -> str:
    """Return the name under which MLFlowLogger logs a metric."""
    prefixed = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name
    return _UNFIT.sub("", prefixed)


def _plain(value: Any) -> Any:
    """Return a number for a tensor, which must not be read from another thread."""
    return value.item() if isinstance(value, Tensor) else value


def _is_refusal(error: Exception) -> bool:
    status = getattr(error, "get_http_status_code", None)
    code = status() if callable(status) else None
    known = getattr(error, "error_code", "INTERNAL_ERROR") != "INTERNAL_ERROR"
    return known and code is not None and 400 <= code < 500 and code not in _TRY_AGAIN
