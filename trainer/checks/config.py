"""The checks of a composed job before it is launched: every problem that can be found without a GPU or a queue."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checks.fits import problems_of_fit
from trainer.checks.parts import problems_of_parts
from trainer.checks.values import problems_of_values
from trainer.config.batch import BatchPlan
from trainer.config.callbacks import problems_of_callbacks
from trainer.config.checkpoint_url import missing_package
from trainer.config.combinations import Job, problems_of_combinations, problems_of_packages
from trainer.config.environment import problems_of_secrets
from trainer.config.limits import limits_of
from trainer.config.loggers import problems_of_loggers
from trainer.config.monitor import problems_of_monitor
from trainer.config.notify import NotifyOptions, problems_of_notify
from trainer.config.optimization import problems_of_accumulation, problems_of_optimization
from trainer.config.own_loaders import problems_of_loaders
from trainer.config.problems import raise_all
from trainer.config.schedule import problems_of_optimizer, problems_of_schedule
from trainer.config.schema import CheckpointOptions, Config, TrainerOptions
from trainer.config.signature import Signature, read
from trainer.config.strategy import ranks_in_group, ranks_per_sample
from trainer.config.targets import problems_of_targets
from trainer.config.typed import closed_class, options_of
from trainer.core.errors import TrainerError, UserError

if TYPE_CHECKING:
    from trainer.config.shape import LaunchShape

_LIMITED = ("trainer", "checkpoint", "tracking", "notify", "resilience", "finetune", "strategy", "cluster")
"""Sections whose limits are checked here: `config/shape.py` checks `resources`."""


def check(config: dict[str, Any], cwd: Path | None = None, fits: bool = True, targets: bool = True) -> None:
    """Check a composed configuration (`Composed.config`) without importing a target.

    Checks the values, the targets and their arguments, the launch shape, and that the batch divides over the ranks.

    Args:
        config: The resolved configuration.
        cwd: Directory that is searched first for targets and paths; None: the working directory.
        fits: Also check that the model and the data can be trained together.
        targets: Also check the targets and paths. False for a run whose code is a snapshot that was checked before.

    Raises:
        UserError: All problems that were found, the most certain first.
        EnvironmentFault: The only problem is this machine, such as a missing package.
    """
    raise_all(list(problems_of_secrets(config)))
    values = [*_limits(config), *problems_of_values(config), *_sections(config), *problems_of_callbacks(config)]
    cwd = cwd or Path.cwd()
    found = list(_of_targets(config, cwd)) if targets else []
    values += [*problems_of_schedule(config), *problems_of_optimizer(config)]
    # A model or data that does not exist needs no second message.
    found = found or [*(problems_of_fit(config, cwd) if fits and targets else ())]
    # Splitting an impossible batch would be a second message about the same mistake.
    splits = not any(problem.message.startswith("data.") for problem in values)
    raise_all([*values, *found, *_launch(config, splits)])
    of_notify = problems_of_notify(config.get("notify") or {}, os.environ)
    url = config["checkpoint"].get("dir")
    of_store = [missing_package(url)] if url is not None else []
    raise_all([*problems_of_packages(config), *problems_of_loggers(config), *of_notify, *filter(None, of_store)])


def _of_targets(config: dict[str, Any], cwd: Path) -> Iterator[TrainerError]:
    """Yield the problems of what the configuration names: classes, functions, files."""
    yield from problems_of_targets(config, cwd)
    yield from problems_of_parts(config, cwd)
    yield from problems_of_loaders(config, cwd)
    yield from problems_of_optimization(config, cwd)
    yield from problems_of_monitor(config, cwd)
    yield from _decay(config, cwd)


def _decay(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield a choice of the parameters with weight decay for an optimizer that has none."""
    node = config["optimizer"] or {}
    chosen = {"no_decay_norm_bias": node.get("no_decay_norm_bias") is True, "decay": node.get("decay") == "matrices"}
    key = next((key for key, is_set in chosen.items() if is_set), None)
    if key is None or not isinstance(node.get("_target_"), str):
        return
    signature = read(node["_target_"], cwd)
    if isinstance(signature, Signature) and not signature.takes_more and "weight_decay" not in signature.names():
        yield UserError(f"optimizer.{key}: {node['_target_']} has no weight_decay", f"use optimizer.{key}=null")


def _limits(config: dict[str, Any]) -> Iterator[UserError]:
    """Yield the values outside of the limits that their field declares; null is checked by type only."""
    for section in _LIMITED:
        node = config.get(section) or {}  # a run of an older release lacks the newer sections
        cls = closed_class(section, node)
        for key, limit in (limits_of(cls) if cls is not None else {}).items():
            value = node.get(key)
            problem = limit.problem(f"{section}.{key}", value) if value is not None else None
            if problem is not None:
                yield problem


def _sections(config: dict[str, Any]) -> Iterator[UserError]:
    """Yield the invalid combinations of values that the dataclasses report."""
    yield from options_of(TrainerOptions, config["trainer"]).problems()
    yield from options_of(CheckpointOptions, config["checkpoint"]).problems()
    yield from options_of(NotifyOptions, config.get("notify") or {}).problems()
    yield from Config(name=config["name"], seed=config["seed"], runs_dir=config["runs_dir"]).problems()


def _local_checkpoints(config: dict[str, Any], shape: LaunchShape) -> Iterator[UserError]:
    """Yield that a rank would need parts of a node-local checkpoint that are on the disks of other nodes."""
    if config["checkpoint"].get("local_dir") is None or shape.nodes == 1:
        return
    strategy, per_node = config["strategy"], shape.processes_per_node
    name = strategy["name"]
    if name == "hsdp" or name.startswith("deepspeed") or ranks_per_sample(strategy, per_node) > per_node:
        yield UserError(
            f"checkpoint.local_dir on {shape.nodes} nodes: with strategy={name} ranks load what other nodes saved",
            "use checkpoint.local_dir=null and a smaller checkpoint.every_n_steps, or strategy=ddp, fsdp, tp in a node",
        )


def _launch(config: dict[str, Any], splits: bool) -> Iterator[TrainerError]:
    """Yield problems of the launch shape, of the batch split, and of options that depend on them."""
    from trainer.config.shape import resolve

    try:
        shape = resolve(config)
    except TrainerError as error:
        yield error
        return
    if config["resources"].get("numa_binding") is not None and shape.device == "cpu":
        yield UserError(
            f"resources.numa_binding={config['resources']['numa_binding']}: torchrun binds a rank to cores near its "
            "GPU, and this job trains on CPU",
            "use resources.numa_binding=null, or GPUs",
        )
    yield from _local_checkpoints(config, shape)
    accumulated = config["trainer"].get("accumulate_grad_batches") or 1
    try:
        ranks_in_group(config["strategy"], shape.world_size, shape.processes_per_node)
        if splits and config["data"].get("batch_size") is not None:
            readers = shape.world_size // ranks_per_sample(config["strategy"], shape.processes_per_node)
            accumulate = config["trainer"].get("accumulate_grad_batches")
            plan = BatchPlan.of(config["data"]["batch_size"], config["data"].get("micro_batch"), readers, accumulate)
            accumulated = plan.accumulate
            yield from problems_of_accumulation(config, plan)
    except UserError as error:
        yield error
    on_gpus = shape.device == "cuda"
    job = Job(config, shape.world_size, shape.processes_per_node, on_gpus, accumulated)
    yield from problems_of_combinations(job)
