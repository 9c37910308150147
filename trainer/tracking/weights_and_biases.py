"""Weights & Biases: one id per run, no matter what happens; never a prompt, a hang or a lost row.

Facts about the client (0.31) that this file relies on:

- `WandbLogger(offline=True)` sets a process-global mode: the mode is passed to `wandb.init` instead.
- Arguments of `wandb.init` take precedence over `WANDB_*` and the settings files: so it gets only what the config sets,
  and the mode that `client_settings.mode_of` determined.
- The default flush interval of 15 s loses everything on SIGKILL; with `x_transaction_log_flush_interval=1` only the
  last second is lost. Those rows are sent again by the next attempt; two rows of one step are one point of the curve.
- `finish()` waits forever for a dead server unless `finish_timeout` is set.
- Every SLURM_* variable is stored and uploaded, including SLURM_JWT (a credential): it is removed first.
- Artifacts are staged in the home directory unless WANDB_DATA_DIR is set.
- Under `wandb agent` (WANDB_SWEEP_ID) the client takes project, entity and id of the sweep, whatever it is passed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import TrackingOptions
from trainer.core.errors import UserError
from trainer.core.secrets import mask_inside
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Event, Tracking, WandbEnvironment
from trainer.runs.registry import reference_to
from trainer.tracking import client_settings
from trainer.tracking.client_settings import DEFAULT_PROJECT, Setting

_SECRET = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)


def start(
    run: RunDirectory,
    options: TrackingOptions,
    config: dict[str, Any],
    unsure: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Start or resume the W&B run with the id of the run, and return wandb's Run. Call it on the first rank only.

    Args:
        run: The run directory.
        options: The section `tracking`.
        config: The config to log.
        unsure: Lines of metrics.jsonl that a killed attempt may not have sent to W&B; they are logged again.

    Raises:
        UserError: The client refuses a variable or an option.
    """
    import pydantic
    import wandb

    events = run.events()
    mode = client_settings.mode_of(options.mode, os.environ, Path.cwd(), client_settings.recorded_mode(events))
    _prepare_environment(run, events)
    settings = _settings(options)
    arguments: dict[str, Any] = {**identity(run, options, events), "resume": "allow", "config": masked(config)}
    arguments["mode"] = mode.value
    try:
        try:
            experiment = wandb.init(settings=settings, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            print(
                f"wandb: {error}; continuing offline, `trainer sync {reference_to(run)}` uploads it later", flush=True
            )
            wandb.teardown()
            mode = Setting("offline", "the server cannot be used")
            experiment = wandb.init(settings=settings, **{**arguments, "mode": "offline"})
    except pydantic.ValidationError as error:
        (first, *_) = error.errors()
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"W&B refuses its setting {name}: {first['msg']}", "change the WANDB_ variable") from error
    _note(run, experiment, mode, options)
    # WandbLogger does this only for a run that it creates itself.
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    for line in unsure:
        values = {name: value for name, value in line.items() if name not in ("step", "time")}
        experiment.log({**values, "trainer/global_step": line["step"]})
    return experiment


def _prepare_environment(run: RunDirectory, events: Sequence[Event]) -> None:
    """Set the settings that W&B's client reads only from environment variables; a user's module may call it, too."""
    os.environ.pop("SLURM_JWT", None)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(run.wandb_dir))
    run.wandb_dir.mkdir(exist_ok=True)
    launches = [event for event in events if isinstance(event, (WandbEnvironment, Tracking))]
    server = next((event.base_url for event in launches if event.base_url), None)
    if server:  # the server of the shell that launched the run: rows must not go elsewhere
        os.environ.setdefault("WANDB_BASE_URL", server)


def identity(run: RunDirectory, options: TrackingOptions, events: Sequence[Event] | None = None) -> dict[str, Any]:
    """Return the arguments of `wandb.init` that identify the W&B run: those of the first attempt that logged."""
    settings = client_settings.read(os.environ, Path.cwd())
    logged = [event for event in (run.events() if events is None else events) if isinstance(event, Tracking)]
    first = next((event for event in logged if event.id), None)
    project = (first and first.project) or options.project
    arguments = {
        "project": project or (settings["project"].value if "project" in settings else DEFAULT_PROJECT),
        "entity": (first and first.entity) or options.entity,
        "id": (first and first.id) or run.id,
        "group": options.group,
        "name": options.run_name or (None if "run_name" in settings else run.path.name),
        "tags": options.tags,
        "notes": options.notes,
        "job_type": options.job_type,
        "dir": options.dir or (None if "dir" in settings else str(run.path)),
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _note(run: RunDirectory, experiment: Any, mode: Setting, options: TrackingOptions) -> None:
    """Write the event `tracking`: what this attempt logs to, and why. Without a server the entity is not known yet."""
    url = experiment.url if mode.value in ("online", "shared") else None
    logs = mode.value != "disabled"
    entity = (experiment.entity if url else None) or options.entity
    run.add_event(
        Tracking(
            mode=mode.value,
            source=mode.source,
            id=experiment.id if logs else None,
            project=experiment.project if logs else None,
            url=url,
            entity=entity or None,
            dir=str(Path(experiment.dir).parent.parent) if logs else None,
            base_url=os.environ.get("WANDB_BASE_URL") or None,
        )
    )
    suffix = f" {url}" if url else ""
    print(f"wandb: {mode.value} ({mode.source}){suffix}", flush=True)


def finish(experiment: Any, exit_code: int, bill: Mapping[str, float] | None = None) -> None:
    """End the W&B run, within `finish_timeout_s`. A server that fails is no reason to fail the training.

    Args:
        experiment: The run.
        exit_code: Of this process.
        bill: What the run has used, for the summary.
    """
    try:
        experiment.summary.update(dict(bill or {}))
        experiment.finish(exit_code=exit_code)
    except Exception as error:
        print(f"wandb: not finished cleanly ({error}); the rows are in {experiment.dir}", flush=True)


def _settings(options: TrackingOptions) -> Any:
    """Return our settings, except those that a variable or a settings file sets."""
    import wandb

    # console off: the run has its own log files
    defaults: dict[str, Any] = {"login_timeout": 5, "console": "off", "silent": True}
    settings = client_settings.read(os.environ, Path.cwd())
    return wandb.Settings(
        init_timeout=options.init_timeout_s,
        finish_timeout=options.finish_timeout_s,
        x_transaction_log_flush_interval=1,
        **{name: value for name, value in defaults.items() if name not in settings},
    )


def masked(value: Any, key: str = "") -> Any:
    """Return `value` with the strings under keys such as token or password, and the secrets in others, replaced."""
    if isinstance(value, dict):
        return {name: masked(child, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [masked(child, key) for child in value]
    return "***" if isinstance(value, str) and _SECRET.search(key) else mask_inside(value)
