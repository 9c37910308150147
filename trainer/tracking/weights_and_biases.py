"""Weights & Biases: one id a run, whatever happens; never a prompt, never a hang, never a lost row.

Facts about the client (0.31) that this file stands on:
- `WandbLogger(offline=True)` sets a process-global mode: the mode is given to `wandb.init` instead.
- What `wandb.init` is given comes before `WANDB_*` and the settings files: so it is given only what the configuration
  says, and the mode that `client_settings.mode_of` found.
- The default flush interval of 15 s loses everything on SIGKILL; with `x_transaction_log_flush_interval=1` it is the
  last second. Those rows are sent again by the next attempt; two rows of one step lie on one point of the curve.
- `finish()` waits for ever for a dead server unless `finish_timeout` is set.
- Every SLURM_* variable is stored and uploaded, SLURM_JWT (a credential) too: it is removed first.
- Artifacts are staged in the home directory unless WANDB_DATA_DIR says otherwise.
- Under `wandb agent` (WANDB_SWEEP_ID) the client takes project, entity and id of the sweep, whatever it is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import TrackingOptions
from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory
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
    """Start, or resume, the W&B run whose id is the run's own; returns wandb's Run. Call it on the first rank only.

    `unsure` are lines of metrics.jsonl that an attempt that was killed may not have got to W&B; they are logged again.
    Raises UserError for a variable or an option that W&B's client refuses.
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
            print(f"wandb: {error}; going on offline, `trainer sync {reference_to(run)}` uploads it later", flush=True)
            wandb.teardown()
            mode = Setting("offline", "the server could not be used")
            experiment = wandb.init(settings=settings, **{**arguments, "mode": "offline"})
    except pydantic.ValidationError as error:
        (first, *_) = error.errors()
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"W&B refuses its setting {name}: {first['msg']}", "change the WANDB_ variable") from error
    _note(run, experiment, mode, options)
    # WandbLogger does this itself only for a run that it makes.
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    for line in unsure:
        values = {name: value for name, value in line.items() if name not in ("step", "time")}
        experiment.log({**values, "trainer/global_step": line["step"]})
    return experiment


def _prepare_environment(run: RunDirectory, events: Sequence[Mapping[str, Any]]) -> None:
    """What the client reads of the environment alone, whoever calls it: a user's module may, too."""
    os.environ.pop("SLURM_JWT", None)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(run.wandb_dir))
    run.wandb_dir.mkdir(exist_ok=True)
    server = next((event["base_url"] for event in events if event.get("base_url")), None)
    if server:  # of the shell that launched the run: its rows go nowhere else
        os.environ.setdefault("WANDB_BASE_URL", server)


def identity(
    run: RunDirectory, options: TrackingOptions, events: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Arguments of `wandb.init` that say which W&B run this is: those of the attempt that was the first to log."""
    said = client_settings.read(os.environ, Path.cwd())
    logged = [event for event in (run.events() if events is None else events) if event["event"] == "tracking"]
    first = next((event for event in logged if event.get("id")), {})
    project = first.get("project") or options.project
    found = {
        "project": project or (said["project"].value if "project" in said else DEFAULT_PROJECT),
        "entity": first.get("entity") or options.entity,
        "id": first.get("id") or run.id,
        "group": options.group,
        "name": options.run_name or (None if "run_name" in said else run.path.name),
        "tags": options.tags,
        "notes": options.notes,
        "job_type": options.job_type,
        "dir": options.dir or (None if "dir" in said else str(run.path)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _note(run: RunDirectory, experiment: Any, mode: Setting, options: TrackingOptions) -> None:
    """The event `tracking`: what this attempt logs to, and why. Without a server the entity is not known yet."""
    url = experiment.url if mode.value in ("online", "shared") else None
    fields = {} if mode.value == "disabled" else {"id": experiment.id, "project": experiment.project, "url": url}
    entity = (experiment.entity if url else None) or options.entity
    folder = None if mode.value == "disabled" else str(Path(experiment.dir).parent.parent)
    server = os.environ.get("WANDB_BASE_URL")
    run.event(
        "tracking",
        logger="wandb",
        mode=mode.value,
        source=mode.source,
        **fields,
        **({"entity": entity} if entity else {}),
        **({"dir": folder} if folder else {}),
        **({"base_url": server} if server else {}),
    )
    where = f" {url}" if url else ""
    print(f"wandb: {mode.value} ({mode.source}){where}", flush=True)


def finish(experiment: Any, exit_code: int) -> None:
    """End the W&B run, within `finish_timeout_s`. A failing server is no reason for a failing training."""
    try:
        experiment.finish(exit_code=exit_code)
    except Exception as error:
        print(f"wandb: not finished cleanly ({error}); the rows are in {experiment.dir}", flush=True)


def _settings(options: TrackingOptions) -> Any:
    """Ours, without those that a variable or a settings file gives."""
    import wandb

    ours: dict[str, Any] = {"login_timeout": 5, "console": "off", "silent": True}  # the log files are the run's own
    said = client_settings.read(os.environ, Path.cwd())
    return wandb.Settings(
        init_timeout=options.init_timeout_s,
        finish_timeout=options.finish_timeout_s,
        x_transaction_log_flush_interval=1,
        **{name: value for name, value in ours.items() if name not in said},
    )


def masked(value: Any, key: str = "") -> Any:
    """`value` with the strings under keys such as token or password replaced."""
    if isinstance(value, dict):
        return {name: masked(child, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [masked(child, key) for child in value]
    return "***" if isinstance(value, str) and _SECRET.search(key) else value
