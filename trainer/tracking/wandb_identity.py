"""Which W&B run a run logs to: chosen once, by the first attempt, and kept in `wandb.json` for all others.

A run of an older release has no `wandb.json`; then its events `tracking` have the W&B run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.schema import TrackingOptions
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Event, Tracking, WandbEnvironment
from trainer.runs.records import WandbRun
from trainer.tracking import client_settings
from trainer.tracking.client_settings import DEFAULT_PROJECT, SWEEP, Setting


def recorded(run: RunDirectory, events: Sequence[Event]) -> WandbRun | None:
    """Return the W&B run of the earlier attempts; None: none of them has logged to W&B."""
    known = run.wandb()
    if known is not None:
        return known
    logged = next((event for event in events if isinstance(event, Tracking) and event.id), None)
    if logged is None or logged.id is None:
        return None
    return WandbRun(
        id=logged.id, project=logged.project, entity=logged.entity, url=logged.url, base_url=logged.base_url
    )


def set_environment(run: RunDirectory, events: Sequence[Event]) -> None:
    """Set the settings that W&B's client reads only from environment variables; a user's module may call it, too.

    Under `wandb agent` the client takes the run that the variables name. So they are set where the job's environment
    did not come with it, and removed where they belong to another run.
    """
    for variable in ("SLURM_JWT", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM"):
        os.environ.pop(variable, None)  # a credential, and what is decided here
    for variable in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value.strip()]:
        del os.environ[variable]  # unset, as everywhere else; the client would refuse an empty WANDB_MODE
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(run.wandb_dir))
    run.wandb_dir.mkdir(exist_ok=True)
    known = recorded(run, events)
    launches = [event for event in events if isinstance(event, WandbEnvironment)]
    servers = [known.base_url if known else None, *(event.base_url for event in launches)]
    server = next(filter(None, servers), None)
    if server:  # that of the shell that launched the run: rows must not go elsewhere
        os.environ.setdefault("WANDB_BASE_URL", server)
    sweep = next((event for event in launches if event.sweep_id), None)
    if sweep is not None and (known is None or known.id == sweep.run_id):
        for name, variable in SWEEP.items():
            if getattr(sweep, name):
                os.environ[variable] = getattr(sweep, name)
    elif known is not None and known.id != os.environ.get("WANDB_RUN_ID"):
        for name in ("sweep_id", "run_id", "sweep_parameters"):
            os.environ.pop(SWEEP[name], None)


def identity(run: RunDirectory, options: TrackingOptions, events: Sequence[Event] | None = None) -> dict[str, Any]:
    """Return the arguments of `wandb.init` that identify the W&B run: those of the first attempt that logged."""
    settings = client_settings.read(os.environ, Path.cwd())
    known = recorded(run, run.events() if events is None else events)
    project = (known and known.project) or options.project
    arguments = {
        "project": project or (settings["project"].value if "project" in settings else DEFAULT_PROJECT),
        "entity": (known and known.entity) or options.entity,
        "id": known.id if known else run.id,
        "group": options.group,
        "name": options.run_name or (None if "run_name" in settings else run.path.name),
        "tags": options.tags,
        "notes": options.notes,
        "job_type": options.job_type,
        "dir": options.dir or (None if "dir" in settings else str(run.path)),
    }
    if os.environ.get("WANDB_SWEEP_ID"):  # the client takes those of the sweep, and warns of others
        for name in ("project", "entity", "id"):
            del arguments[name]
    return {name: value for name, value in arguments.items() if value is not None}


def record(run: RunDirectory, experiment: Any, mode: Setting, options: TrackingOptions) -> WandbRun | None:
    """Write what this attempt logs to, and why, into `wandb.json` and an event. None: nothing is logged to W&B."""
    is_online = mode.value in ("online", "shared")
    url = experiment.url if is_online else None
    logs = mode.value != "disabled"
    entity = (experiment.entity if url else None) or options.entity or None
    base_url = os.environ.get("WANDB_BASE_URL") or None
    run.add_event(
        Tracking(
            mode=mode.value,
            source=mode.source,
            id=experiment.id if logs else None,
            project=experiment.project if logs else None,
            url=url,
            entity=entity,
            dir=str(Path(experiment.dir).parent.parent) if logs else None,
            base_url=base_url,
        )
    )
    print(f"wandb: {mode.value} ({mode.source})" + (f" {url}" if url else ""), flush=True)
    if not logs:
        return None
    before = run.wandb() or WandbRun(id=experiment.id)
    now = replace(
        before,
        project=experiment.project,
        entity=entity or before.entity,
        sweep_id=experiment.sweep_id or before.sweep_id,
        url=url or before.url,
        base_url=base_url,
    )
    if now != before or run.wandb() is None:
        run.write_wandb(now)
    return now
