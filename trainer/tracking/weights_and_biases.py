"""Weights & Biases: one id per run, no matter what happens; never a prompt, a hang or a lost row.

Facts about the client (0.31) that this file relies on:

- `WandbLogger(offline=True)` sets a process-global mode: the mode is passed to `wandb.init` instead.
- Arguments of `wandb.init` take precedence over `WANDB_*` and the settings files: so it gets only what the config sets,
  and the mode that `client_settings.mode_of` determined.
- The default flush interval of 15 s loses everything on SIGKILL; with `x_transaction_log_flush_interval=1` only the
  last second is lost. `wandb_rows` finds out which rows these are.
- `finish()` waits forever for a dead server unless `finish_timeout` is set.
- Every SLURM_* variable is stored and uploaded, including SLURM_JWT (a credential): it is removed first.
- Artifacts are staged in the home directory unless WANDB_DATA_DIR is set.
- Under `wandb agent` (WANDB_SWEEP_ID) the client takes project, entity and id of the sweep, whatever it is passed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.schema import TrackingOptions
from trainer.core.errors import UserError
from trainer.core.secrets import mask_inside
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking
from trainer.runs.metrics_lines import lines_after
from trainer.runs.records import WandbRun
from trainer.runs.registry import reference_to
from trainer.tracking import client_settings, wandb_identity
from trainer.tracking.client_settings import Setting
from trainer.tracking.upload import upload
from trainer.tracking.wandb_facts import command_of
from trainer.tracking.wandb_rows import AXIS, OneCurve, Sent

_SECRET = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)


@dataclass(frozen=True)
class Position:
    """Where the training of an attempt begins, for the curve in W&B."""

    step: int = 0
    """The optimizer step from which the attempt resumes."""
    completed_steps: Callable[[], int] = lambda: 0
    """Returns the completed optimizer steps."""
    unsure: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl that a killed attempt of an older release may not have sent to W&B."""
    ended_well: bool = False
    """Whether the attempt before this one has ended by itself."""


def start(run: RunDirectory, options: TrackingOptions, config: dict[str, Any], position: Position | None = None) -> Any:
    """Start or resume the W&B run, and return wandb's Run. Call it on the first rank only.

    Args:
        run: The run directory.
        options: The section `tracking`.
        config: The config to log.
        position: Where the training begins.

    Raises:
        UserError: The client refuses a variable or an option.
    """
    import pydantic

    position = position or Position()
    events = run.events()
    mode = client_settings.mode_of(options.mode, os.environ, Path.cwd(), client_settings.recorded_mode(events))
    wandb_identity.set_environment(run, events)
    if mode.value == "online":
        mode = _after_earlier_segments(run, options, mode)
    arguments: dict[str, Any] = {
        **wandb_identity.identity(run, options, events),
        "settings": _settings(run, options),
        "config": masked(config),
        "command": command_of(run),
    }
    sent = Sent.read(run.wandb_dir / "rows.jsonl")
    try:
        experiment = None
        if mode.value == "online" and sent.after(position.step):
            experiment = _rewound(run, sent, position.step, arguments)
        if experiment is None:
            experiment, mode = _open(run, mode, arguments)
    except pydantic.ValidationError as error:
        (first, *_) = error.errors()
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"W&B refuses its setting {name}: {first['msg']}", "change the WANDB_ variable") from error
    wandb_identity.record(run, experiment, mode, options)
    # WandbLogger does this only for a run that it creates itself.
    experiment.define_metric(AXIS)
    experiment.define_metric("*", step_metric=AXIS, step_sync=True)
    if mode.value in ("online", "offline"):
        _join(run, experiment, mode, sent, position)
    return experiment


def _after_earlier_segments(run: RunDirectory, options: TrackingOptions, mode: Setting) -> Setting:
    """Upload what earlier attempts logged offline, so that the rows stay in order; without it, stay offline."""
    done = upload(run, timeout_s=options.finish_timeout_s)
    if done.uploaded:
        print(f"wandb: uploaded {done.uploaded} offline segments of earlier attempts", flush=True)
    if not done.failed:
        return mode
    print("wandb: what earlier attempts logged offline could not be uploaded; continuing offline", flush=True)
    return Setting("offline", "earlier offline segments are not uploaded yet")


def _open(run: RunDirectory, mode: Setting, arguments: dict[str, Any]) -> tuple[Any, Setting]:
    """Start the W&B run or append to it; offline, if the server cannot be used."""
    import wandb

    arguments = {**arguments, "resume": "allow"}
    try:
        return _init(arguments, mode=mode.value), mode
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        print(f"wandb: {error}; continuing offline, `trainer sync {reference_to(run)}` uploads it later", flush=True)
        wandb.teardown()
        return _init(arguments, mode="offline"), Setting("offline", "the server cannot be used")


def _init(arguments: dict[str, Any], **more: Any) -> Any:
    """Call `wandb.init` with a copy of the settings, which it changes, as if `trainer fit ...` had called it."""
    import wandb

    given, sys.argv = sys.argv, arguments["command"]
    passed = {name: value for name, value in arguments.items() if name != "command"}
    try:
        return wandb.init(**{**passed, **more, "settings": arguments["settings"].model_copy()})
    finally:
        sys.argv = given


def _rewound(run: RunDirectory, sent: Sent, step: int, arguments: dict[str, Any]) -> Any:
    """Continue the W&B run after its last row up to `step`; None: the server cannot, or has no later row."""
    import wandb

    known, target = run.wandb(), sent.rewind_target(step)
    if known is None or known.rewinds is False or target is None or _last_row_served(known) <= target:
        return None
    given = {name: value for name, value in arguments.items() if name != "id"}
    try:
        experiment = _init(given, mode="online", resume_from=f"{known.id}?_step={target}")
    except wandb.errors.Error as error:
        print(f"wandb: the server does not rewind a run ({error}); no row is sent twice", flush=True)
        wandb.teardown()
        run.write_wandb(replace(known, rewinds=False))
        return None
    run.write_wandb(replace(known, rewinds=True))
    return experiment


def _last_row_served(known: WandbRun) -> int:
    """Return the number of the last row that the server has; -1: none, or unknown."""
    import wandb

    try:
        path = "/".join(filter(None, (known.entity, known.project, known.id)))
        return int(wandb.Api(timeout=10).run(path).lastHistoryStep)
    except Exception:  # of many kinds; the attempt then appends
        return -1


def _join(run: RunDirectory, experiment: Any, mode: Setting, sent: Sent, position: Position) -> None:
    """Put the step into every row from now on, and continue the curve of the earlier attempts."""
    import wandb

    curve = OneCurve(experiment, run.wandb_dir / "rows.jsonl", mode.value, position.completed_steps)
    experiment.log = curve.log
    wandb.log = curve.log
    lines = partial(lines_after, run.metrics_path)
    if not sent.segments:  # the earlier attempts were of an older release
        curve.continue_from(sent, position.step, lambda step: position.unsure)
    else:
        was_off = any(event.mode == "disabled" for event in run.events_of(Tracking))
        curve.continue_from(sent, position.step, lines, ended_well=position.ended_well, only_sent=was_off)


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
        curve = getattr(experiment.log, "__self__", None)
        if isinstance(curve, OneCurve):
            curve.close()
    except Exception as error:
        print(f"wandb: not finished cleanly ({error}); the rows are in {experiment.dir}", flush=True)


def _settings(run: RunDirectory, options: TrackingOptions) -> Any:
    """Return our settings, except those that a variable or a settings file sets."""
    import wandb

    # console wrap: what Python prints; the rank's log file has the rest
    defaults: dict[str, Any] = {"login_timeout": 5, "console": "wrap", "silent": True}
    settings = client_settings.read(os.environ, Path.cwd())
    return wandb.Settings(
        init_timeout=options.init_timeout_s,
        finish_timeout=options.finish_timeout_s,
        x_transaction_log_flush_interval=1,
        program="trainer",
        stop_fn=lambda: run.request_stop("the Stop button of W&B"),
        **{name: value for name, value in defaults.items() if name not in settings},
    )


def masked(value: Any, key: str = "") -> Any:
    """Return `value` with the strings under keys such as token or password, and the secrets in others, replaced."""
    if isinstance(value, dict):
        return {name: masked(child, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [masked(child, key) for child in value]
    return "***" if isinstance(value, str) and _SECRET.search(key) else mask_inside(value)
