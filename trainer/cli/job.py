"""The checked jobs of a command line, and the plan that is printed for them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checks.config import check
from trainer.cli.initial import settle_micro_batch, settle_start
from trainer.cli.overrides import name_point
from trainer.config.batch import BatchPlan
from trainer.config.compose import Composed, frozen_hydra
from trainer.config.hydra_files import HydraFiles
from trainer.config.loggers import settle_loggers
from trainer.config.notify import channel_names
from trainer.config.problems import raise_all
from trainer.config.shape import LaunchShape, resolve
from trainer.config.strategy import ranks_per_sample
from trainer.core.errors import TrainerError
from trainer.launch import launchers
from trainer.tracking.client_settings import DEFAULT_PROJECT, Setting, mode_of, problems_of, settle


@dataclass(frozen=True)
class Job:
    """One checked job of the command line."""

    composed: Composed
    shape: LaunchShape
    hydra: HydraFiles
    """The part of Hydra's own node that the run keeps."""
    tracking_sources: dict[str, Setting] = field(default_factory=dict)
    """Options of the section `tracking` that W&B's environment variables and settings files filled in."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.composed.config

    def batch(self) -> BatchPlan | None:
        """Return the split of the global batch, or None if the data module's own loader sets the batch size."""
        data = self.config["data"]
        if data.get("batch_size") is None:
            return None
        sharing = ranks_per_sample(self.config["strategy"], self.shape.processes_per_node)
        readers, accumulate = self.shape.world_size // sharing, self.config["trainer"]["accumulate_grad_batches"]
        return BatchPlan.of(data["batch_size"], data.get("micro_batch"), readers, accumulate)


def check_all(composed: list[Composed], fits: bool = True) -> list[Job]:
    """Check every job, and write its launch shape into `resources`, before the first job is launched.

    Args:
        composed: The composed configurations.
        fits: Also check that the model of each job accepts its data.

    Raises:
        UserError: With all problems of the first job that has any.
        EnvironmentFault: If this machine cannot launch the job.
    """
    jobs = []
    for one in composed:
        try:
            shape, sources = check_one(one, fits=fits)
            jobs.append(Job(one, shape, frozen_hydra(one), sources))
        except TrainerError as error:
            raise name_point(error, one.overrides, len(composed)) from None
    for job in jobs:
        freeze_shape(job.config, job.shape)
    return jobs


def check_one(
    one: Composed,
    *,
    fits: bool = True,
    targets: bool = True,
    cwd: Path | None = None,
    ask_cluster: Callable[[str], bool] = lambda request: True,
) -> tuple[LaunchShape, dict[str, Setting]]:
    """Check a job, and settle the values of its configuration that are replaced once.

    Args:
        one: The composed configuration, which is changed.
        fits: Also check that the model accepts the data.
        targets: Also check the targets: False for code that was checked when it was frozen.
        cwd: Folder that relative paths refer to; None: the working directory.
        ask_cluster: Whether the cluster validates a job with these options and this shape: the jobs of a sweep share
            most of them.

    Returns:
        The launch shape, and what W&B's environment variables and settings files filled in.

    Raises:
        UserError: With all problems of the job.
        EnvironmentFault: This machine cannot launch the job.
    """
    config = one.config
    launchers.prepare(config)
    settle_start(config)
    settle_micro_batch(config)
    settle_loggers(config)
    check(config, cwd, fits=fits, targets=targets)
    shape = resolve(config)
    if "auto" in (config["strategy"]["name"], config["strategy"]["activation_checkpointing"]):
        _settle_strategy(config, shape, fits)
    asked = json.dumps([config["cluster"], config["resources"], str(shape)], sort_keys=True, default=str)
    if ask_cluster(asked):
        launchers.check(config, shape)
    return shape, _settle_tracking(config["tracking"])


def _settle_strategy(config: dict[str, Any], shape: LaunchShape, fits: bool) -> None:
    """Replace `auto` by what the plan chooses, and report it; what was chosen is checked as if it had been written."""
    from trainer.cli.auto import settle_auto  # only needed with auto
    from trainer.cli.planning import device_of

    before = config["strategy"]["name"]
    for line in settle_auto(config, shape, device_of(config) if shape.device == "cuda" else None):
        print(f"note: {line}", file=sys.stderr)
    if config["strategy"]["name"] != before:
        check(config, fits=fits)


def describe(job: Job) -> list[tuple[str, str]]:
    """Return the plan of a job as pairs of a title and a text."""
    config, plan = job.config, job.batch()
    options, checkpoint = config["trainer"], config["checkpoint"]
    if plan is None:
        batch = "set by the module's own loader, per rank"
        accumulate = options["accumulate_grad_batches"] or 1
        batch += f", gradients accumulated over {accumulate}" if accumulate > 1 else ""
    else:
        batch = f"{plan.global_batch} samples per step = {plan.split(job.shape.world_size)}"
        if options["find_micro_batch"]:
            batch = f"{plan.global_batch} samples per step, in the largest micro-batches that fit (found at the start)"
    limits = [f"{options[key]} {word}" for key, word in _LIMITS.items() if options[key] is not None]
    saves = [f"every {checkpoint[key]:g} {word}" for key, word in _SAVES.items() if checkpoint[key] is not None]
    return [
        ("run", f"{config['runs_dir']}/{config['name']}-ID"),
        ("shape", f"{job.shape}, strategy {config['strategy']['name']}, precision {options['precision']}"),
        ("model", config["model"]["_target_"]),
        ("data", config["data"]["_target_"] or "none: the model's own loaders"),
        ("batch", batch),
        ("until", " or ".join(limits)),
        ("validation", _validation(options)),
        ("checkpoint", _checkpoints(checkpoint, saves)),
        ("tracking", ", and ".join([_tracking(config["tracking"], job.tracking_sources), *_own_loggers(config)])),
        *([("notify", told)] if (told := _notify(config["notify"])) else []),
        *([("cost", cost)] if (cost := launchers.cost(config, job.shape)) else []),
    ]


def _checkpoints(options: dict[str, Any], saves: list[str]) -> str:
    best, kept = options["keep_best"], f"keeps {options['keep_last']} newest"
    if best and options["save_best"]:
        saves = [*saves, "after each best validation"]
    if best:
        kept += " and the best" if best == 1 else f" and the {best} best"
    return f"{', '.join(saves)}{' and ' if saves else ''}at the end; {kept}"


def _settle_tracking(options: dict[str, Any]) -> dict[str, Setting]:
    if options["name"] != "wandb":
        return {}
    sources = settle(options, os.environ, Path.cwd())
    if mode_of(options["mode"], os.environ, Path.cwd()).value != "disabled":
        raise_all(problems_of(options, os.environ, sources))
    return sources


def _notify(options: dict[str, Any]) -> str:
    """Describe channels and events: `slack, mail: failed, hang`; empty without a channel."""
    names = channel_names(options)
    return f"{', '.join(names)}: {', '.join(options['events'])}" if names else ""


def _own_loggers(config: dict[str, Any]) -> list[str]:
    return [f"logger {name}" for name, node in config["logger"].items() if node]


def _tracking(options: dict[str, Any], sources: dict[str, Setting]) -> str:
    """Describe the tracking: `wandb offline (WANDB_MODE), project digits (WANDB_PROJECT)`."""
    if options["name"] != "wandb":
        return str(options["name"])
    mode = mode_of(options["mode"], os.environ, Path.cwd())
    if mode.value == "disabled":
        return f"wandb disabled ({mode.source}): only metrics.jsonl"
    values = {"project": options["project"] or DEFAULT_PROJECT, **{key: options[key] for key in _NAMED if options[key]}}
    parts = [
        f"{key} {value} ({sources[key].source})" if key in sources else f"{key} {value}"
        for key, value in values.items()
    ]
    return ", ".join([f"wandb {mode.value} ({mode.source})", *parts])


_NAMED = ("entity", "group")


def _validation(options: dict[str, Any]) -> str:
    """Describe when the model is validated."""
    interval, epochs = options["val_check_interval"], options["check_val_every_n_epoch"]
    which = "each epoch" if epochs in (None, 1) else f"one of {epochs} epochs"
    if options["limit_val_batches"] == 0:
        return "none"
    if interval is None or (interval == 1.0 and isinstance(interval, float)):
        return f"at the end of {which}"
    if interval <= 1 and isinstance(interval, float):
        return f"after each {interval:g} of {which}"
    return f"every {interval:g} optimizer steps" + (", counted over epochs" if epochs is None else f" within {which}")


_LIMITS = {"max_steps": "steps", "max_epochs": "epochs", "max_time": "(DD:HH:MM:SS)"}
_SAVES = {"every_n_steps": "steps", "every_minutes": "minutes"}


def freeze_shape(config: dict[str, Any], shape: LaunchShape) -> None:
    """Write the resolved shape into the configuration before it is frozen, so that every rank reads the same."""
    resources = config["resources"]
    resources["nodes"] = shape.nodes
    if shape.device == "cuda":
        resources["gpus"], resources["gpus_per_node"] = shape.world_size, shape.processes_per_node
    else:
        resources["gpus"], resources["gpus_per_node"] = 0, None
        resources["cpu_processes"] = shape.world_size
