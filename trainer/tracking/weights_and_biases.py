"""Weights & Biases: one id a run, whatever happens; never a prompt, never a hang, never a lost row.

Facts about the client (0.31) that this file stands on:
- `WandbLogger(offline=True)` sets a process-global mode: the mode is given to `wandb.init` instead.
- The default flush interval of 15 s loses everything on SIGKILL; with `x_transaction_log_flush_interval=1` it is the
  last second. Those rows are sent again by the next attempt; two rows of one step lie on one point of the curve.
- `finish()` waits for ever for a dead server unless `finish_timeout` is set.
- Every SLURM_* variable is stored and uploaded, SLURM_JWT (a credential) too: it is removed first.
- Artifacts are staged in the home directory unless WANDB_DATA_DIR says otherwise.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from trainer.config.schema import TrackingOptions
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import reference_to

_SECRET = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)


class WandbCurves(WandbLogger):
    """WandbLogger whose x axis is the number of optimizer steps completed, for training and validation alike."""

    def __init__(self, experiment: Any, completed_steps: Callable[[], int]) -> None:
        super().__init__(experiment=experiment, log_model=False)
        self._completed_steps = completed_steps

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step=self._completed_steps())


def start(
    run: RunDirectory,
    options: TrackingOptions,
    config: dict[str, Any],
    completed_steps: Callable[[], int],
    unsure: Sequence[Mapping[str, Any]] = (),
) -> WandbCurves:
    """Start, or go on with, the W&B run whose id is the run's own. Call it on the first rank only.

    `unsure` are lines of metrics.jsonl that an attempt that was killed may not have got to W&B; they are logged again.
    """
    import wandb

    os.environ.pop("SLURM_JWT", None)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(run.wandb_dir))
    run.wandb_dir.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {
        "project": options.project,
        "entity": options.entity,
        "group": options.group,
        "tags": list(options.tags),
        "name": run.path.name,
        "id": run.id,
        "resume": "allow",
        "dir": str(run.path),
        "config": masked(config),
    }
    mode: Any = options.mode if options.mode != "auto" else ("online" if has_key() else "offline")
    try:
        experiment = wandb.init(mode=mode, settings=_settings(options), **arguments)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        print(f"wandb: {error}; going on offline, `trainer sync {reference_to(run)}` uploads it later", flush=True)
        wandb.teardown()
        experiment = wandb.init(mode="offline", settings=_settings(options), **arguments)
    # WandbLogger does this itself only for a run that it makes.
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    for line in unsure:
        values = {name: value for name, value in line.items() if name not in ("step", "time")}
        experiment.log({**values, "trainer/global_step": line["step"]})
    return WandbCurves(experiment, completed_steps)


def finish(logger: WandbCurves, exit_code: int) -> None:
    """End the W&B run, within `finish_timeout_s`. A failing server is no reason for a failing training."""
    try:
        logger.experiment.finish(exit_code=exit_code)
    except Exception as error:
        print(f"wandb: not finished cleanly ({error}); the rows are in {logger.experiment.dir}", flush=True)


def _settings(options: TrackingOptions) -> Any:
    import wandb

    return wandb.Settings(
        init_timeout=options.init_timeout_s,
        finish_timeout=options.finish_timeout_s,
        login_timeout=5,
        x_transaction_log_flush_interval=1,
        console="off",  # the log files are the run's own
        silent=True,
    )


def has_key() -> bool:
    """Whether a key can be found without asking anybody: the environment, or the netrc entry of the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def masked(value: Any, key: str = "") -> Any:
    """`value` with the strings under keys such as token or password replaced."""
    if isinstance(value, dict):
        return {name: masked(child, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [masked(child, key) for child in value]
    return "***" if isinstance(value, str) and _SECRET.search(key) else value
