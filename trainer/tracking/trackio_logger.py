"""trackio as a Lightning logger, in any Trainer; in a run it is one trackio run over all attempts.

Facts about trackio (0.43) that this file relies on:

- `init(name=..., resume="allow")` resumes the newest run of that name. A run directory has a name of its own.
- `Run.log` neither waits nor raises: a thread writes every half a second, and `finish` waits for it, 30 s at most.
- A step may have several rows, and none can be taken back. The config is sent with the first row.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from trainer.core.secrets import mask
from trainer.runs.directory import RunDirectory
from trainer.tracking.sent import SentSteps


class TrackioLogger(Logger):
    """Log to trackio: a database on this machine (TRACKIO_DIR), a Hugging Face Space, or a server of your own.

    `trackio show --project PROJECT` opens it. Addresses and tokens of servers are read from TRACKIO_SPACE_ID,
    TRACKIO_SERVER_URL and TRACKIO_WRITE_TOKEN, as by trackio itself.

    Args:
        project: trackio's project.
        name: Name of the run; None: one of trackio's own, and in a run directory the name of the run.
        group: Group of runs in the dashboard.
        space_id: Hugging Face Space, `USER/NAME`.
        private: Whether the Space is private.
        auto_log_gpu: Log GPU figures; None: if nvidia-ml-py is installed.
        auto_log_cpu: Log CPU figures; None: if psutil is installed.
        config: Configuration of the run.
    """

    def __init__(
        self,
        project: str = "trainer",
        name: str | None = None,
        *,
        group: str | None = None,
        space_id: str | None = None,
        private: bool | None = None,
        auto_log_gpu: bool | None = None,
        auto_log_cpu: bool | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._project, self._run_name = project, name
        self.config = dict(config or {})
        """Sent with the first row."""
        self._options: dict[str, Any] = {
            "group": group,
            "space_id": space_id,
            "private": private,
            "auto_log_gpu": auto_log_gpu,
            "auto_log_cpu": auto_log_cpu,
        }
        self._run: Any = None
        self._is_finished = False
        self._sent = SentSteps({})

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's Run, on the first rank; elsewhere an object that accepts every call."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self._project,
                self._run_name,
                config=self.config,
                resume="never" if self._run_name is None else "allow",
                embed=False,
                **self._options,
            )
            self._run_name = self._run.name
        return self._run

    @property
    def name(self) -> str:
        """Trackio's project."""
        return self._project

    @property
    def version(self) -> str | None:
        """Name of the run; None before it is created."""
        return self._run_name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics that the run does not have at this step."""
        new = dict(metrics) if step is None else self._sent.new(metrics, step)
        if new:
            values = {name: value.item() if isinstance(value, Tensor) else value for name, value in new.items()}
            self.experiment.log(values, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add hyperparameters to the config, with nested names joined by `/`. Later than the first row: no effect."""
        flat = _flatten_dict(_convert_params(params))
        self.experiment.config.update({name: value for name, value in flat.items() if not str(name).startswith("_")})

    @rank_zero_only
    def flush(self) -> None:
        """Write what a local run has queued, so that a checkpoint does not outlive what was logged before it."""
        run = self.experiment
        if run._is_local and not self._is_finished:
            with run._client_lock:
                run._flush_queues_inline()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest, 30 s at most."""
        if self._run is not None and not self._is_finished:
            self._is_finished = True
            self._run.finish()
            from trackio import context_vars

            context_vars.current_run.set(None)  # else trackio finishes it again when the process exits

    def follow(self, run: RunDirectory, step: int) -> None:
        """Send only what earlier attempts of `run`, which is resumed at `step`, have not sent. On the first rank."""
        last: dict[str, int] = {}
        for row in self._rows():
            for name in row.keys() - {"step", "timestamp"}:
                last[name] = max(int(row["step"]), last.get(name, -1))
        self._sent = SentSteps(last)
        for at, metrics in self._sent.missing(run.metrics_path, step):
            self.log_metrics(metrics, at)

    def _rows(self) -> list[dict[str, Any]]:
        """Return what the run holds: in the database of this machine, or on the server."""
        run = self.experiment
        if run._is_local:
            from trackio.sqlite_storage import SQLiteStorage

            return list(SQLiteStorage.get_logs(run.project, run.name, run_id=run.id))
        from trackio.remote_client import RemoteClient

        try:
            client = RemoteClient(
                run._remote_storage_key,
                hf_token=run._hf_token_for_remote(),
                write_token=run._write_token,
                verbose=False,
            )
            return list(client.predict(api_name="/get_logs", project=run.project, run=run.name, run_id=run.id))
        except Exception as error:
            print(f"trackio: {mask(str(error))}; steps that are logged again may be there twice", flush=True)
            return []
