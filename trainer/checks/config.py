"""Everything about a composed job that can be found wrong before it is launched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checks.fits import problems_of_fit
from trainer.checks.parts import problems_of_own
from trainer.config.batch import BatchPlan
from trainer.config.callbacks import problems_of_callbacks
from trainer.config.combinations import Job, problems_of_combinations, problems_of_packages
from trainer.config.loggers import problems_of_loggers
from trainer.config.monitor import problems_of_monitor
from trainer.config.optimization import problems_of_accumulation, problems_of_optimization
from trainer.config.own_loaders import problems_of_loaders
from trainer.config.problems import raise_all
from trainer.config.schedule import problems_of_optimizer, problems_of_schedule
from trainer.config.strategy import (
    ACTIVATION_CHECKPOINTING,
    BROADCAST_BUFFERS,
    OFFLOAD,
    REDUCE_DTYPES,
    ranks_in_group,
    ranks_per_sample,
)
from trainer.config.targets import problems_of_targets
from trainer.config.typed import PRECISIONS, as_written
from trainer.core.errors import TrainerError, UserError
from trainer.core.near import did_you_mean, listed


@dataclass(frozen=True)
class _From:
    """Numbers from `low` on; `above`: more than `low`."""

    low: float
    above: bool = False

    def problem(self, key: str, value: Any) -> UserError | None:
        # A comparison that NaN fails, whichever way.
        if value > self.low or (value == self.low and not self.above):
            return None
        wanted = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        fix = f"use a number above {self.low:g}" if self.above else f"use {key}={self.low:g} or more"
        return UserError(f"{key}={as_written(value)}: must be {wanted}", fix)


@dataclass(frozen=True)
class _OneOf:
    names: tuple[Any, ...]

    def problem(self, key: str, value: Any) -> UserError | None:
        if value in self.names:
            return None
        hint = did_you_mean(str(value), [name for name in self.names if isinstance(name, str)], prefix=f"{key}=")
        return UserError(
            f"{key}={as_written(value)}: there is no such choice",
            f"{hint}choose one of: {listed(map(as_written, self.names))}",
        )


@dataclass(frozen=True)
class _Batches:
    """A number of batches, or a fraction from 0 to 1 of them, as Lightning takes it."""

    zero: bool
    """Whether none is a choice."""

    def problem(self, key: str, value: Any) -> UserError | None:
        whole = isinstance(value, int) or (value > 1 and value % 1 == 0)
        if (whole or 0 <= value <= 1) and (value > 0 or (value == 0 and self.zero)):
            return None
        lowest = "0" if self.zero else "1"
        what = "a number of them, or a fraction up to 1.0"
        return UserError(f"{key}={as_written(value)}: expected {what}", f"use {key}={lowest} or more, or {key}=0.25")


_POSITIVE = _From(0, above=True)

_RANGES: dict[str, _From | _OneOf | _Batches] = {
    "trainer.max_steps": _From(1),
    "trainer.max_epochs": _From(1),
    "trainer.min_steps": _From(0),
    "trainer.min_epochs": _From(0),
    "trainer.precision": _OneOf(PRECISIONS),
    "trainer.accumulate_grad_batches": _From(1),
    "trainer.log_every_n_steps": _From(1),
    "trainer.val_check_interval": _Batches(zero=False),
    "trainer.check_val_every_n_epoch": _From(1),
    "trainer.limit_train_batches": _Batches(zero=False),
    "trainer.limit_val_batches": _Batches(zero=True),
    "trainer.limit_test_batches": _Batches(zero=True),
    "trainer.limit_predict_batches": _Batches(zero=True),
    "trainer.overfit_batches": _Batches(zero=True),
    "trainer.num_sanity_val_steps": _From(-1),
    "trainer.gradient_clip_norm": _POSITIVE,
    "trainer.gradient_clip_val": _POSITIVE,
    "trainer.gradient_clip_algorithm": _OneOf(("norm", "value")),
    "trainer.deterministic": _OneOf((True, False, "warn")),
    "trainer.profiler": _OneOf(("simple", "advanced", "pytorch")),
    "trainer.reload_dataloaders_every_n_epochs": _From(0),
    "checkpoint.every_n_steps": _From(1),
    "checkpoint.every_minutes": _POSITIVE,
    "checkpoint.keep_last": _From(1),
    "checkpoint.keep_best": _From(0),
    "checkpoint.keep_every_n_steps": _From(1),
    "checkpoint.save_best_every_minutes": _POSITIVE,
    "checkpoint.local_every_n_steps": _From(1),
    "checkpoint.local_keep_last": _From(1),
    "checkpoint.mode": _OneOf(("min", "max")),
    "checkpoint.on_failure": _OneOf(("stop", "warn")),
    "tracking.name": _OneOf(("wandb", "none")),
    "tracking.mode": _OneOf(("auto", "online", "offline", "disabled", "shared")),
    "tracking.init_timeout_s": _From(1),
    "tracking.finish_timeout_s": _From(1),
    "resilience.max_restarts": _From(0),
    "resilience.agree_every_s": _POSITIVE,
    "resilience.stop_deadline_s": _POSITIVE,
    "resilience.collective_timeout_s": _POSITIVE,
    "resilience.on_nonfinite": _OneOf(("stop", "skip", "rollback", "off")),
    "resilience.spike_z": _POSITIVE,
    "resilience.on_spike": _OneOf(("stop", "skip", "rollback")),
    "resilience.on_oom": _OneOf(("stop", "halve")),
    "resilience.hang_factor": _From(0),
    "resilience.hang_after_s": _POSITIVE,
    "resilience.hang_slow_s": _POSITIVE,
    "resilience.straggler_factor": _From(0),
    "resilience.straggler_after_s": _From(0),
    "finetune.lora_rank": _From(1),
    "finetune.lora_alpha": _POSITIVE,
    "strategy.activation_checkpointing": _OneOf(ACTIVATION_CHECKPOINTING),
    "strategy.bucket_cap_mb": _From(1),
    "strategy.broadcast_buffers": _OneOf(BROADCAST_BUFFERS),
    "strategy.reduce_dtype": _OneOf(REDUCE_DTYPES),
    "strategy.prefetch": _From(0),
    "strategy.shard_size": _From(1),
    "strategy.tensor_parallel_size": _From(1),
    "strategy.reduce_bucket_size": _From(1),
    "strategy.allgather_bucket_size": _From(1),
    "strategy.offload_optimizer": _OneOf(OFFLOAD),
    "strategy.offload_parameters": _OneOf(OFFLOAD),
    "data.batch_size": _From(1),
    "data.micro_batch": _From(1),
    "data.num_workers": _From(0),
}
"""Key to what it may be; null is judged by the types alone."""


def check(config: dict[str, Any], cwd: Path | None = None, fits: bool = True) -> None:
    """Raise UserError with every problem of a composed configuration (`Composed.config`); the surest first.

    Looks at values, at targets and their arguments (from `cwd`, then as Python would), at the launch shape and
    at how the batch divides; with `fits` at whether model and data go together. Raises EnvironmentFault when only the
    machine is at fault. Imports no target.
    """
    values = [*_ranges(config), *_limits(config), *_names(config), *problems_of_callbacks(config)]
    cwd = cwd or Path.cwd()
    targets = [*problems_of_targets(config, cwd), *problems_of_own(config, cwd)]
    targets += problems_of_loaders(config, cwd)
    targets += problems_of_optimization(config, cwd)
    targets += problems_of_monitor(config, cwd)
    values += [*problems_of_schedule(config), *problems_of_optimizer(config)]
    # A model or data that is not there needs no second message.
    targets = targets or [*(problems_of_fit(config, cwd) if fits else ())]
    # Splitting an impossible batch would be a second message about the same mistake.
    splits = not any(problem.message.startswith("data.") for problem in values)
    raise_all([*values, *targets, *_launch(config, splits)])
    raise_all([*problems_of_packages(config), *problems_of_loggers(config)])


def _ranges(config: dict[str, Any]) -> Iterator[UserError]:
    for dotted, allowed in _RANGES.items():
        section, key = dotted.split(".")
        value = config[section].get(key)
        if value is None:
            continue
        if section == "data" and (not isinstance(value, int) or isinstance(value, bool)):
            yield UserError(f"{dotted}={as_written(value)}: expected an integer", f"write {dotted}=32")
            continue
        problem = allowed.problem(dotted, value)
        if problem:
            yield problem


def _limits(config: dict[str, Any]) -> Iterator[UserError]:
    options = config["trainer"]
    if all(options[key] is None for key in ("max_steps", "max_epochs", "max_time")):
        yield UserError(
            "trainer.max_steps, trainer.max_epochs and trainer.max_time are all null: training would never end",
            "set one of them, such as trainer.max_epochs=10",
        )
    strategy, precision = config["strategy"]["name"], options["precision"]
    if precision == "64-true" and strategy not in ("single", "ddp", "auto"):
        fix = "use strategy=ddp, or trainer.precision=32-true"
        yield UserError(f"trainer.precision=64-true does not go with strategy={strategy}", fix)
    if options.get("gradient_clip_algorithm") == "value" and strategy.startswith("deepspeed"):
        fix = f"use trainer.gradient_clip_norm={options.get('gradient_clip_val')}, or another strategy"
        yield UserError("trainer.gradient_clip_algorithm=value: DeepSpeed clips by norm only", fix)
    time = options["max_time"]
    if time is not None and not re.fullmatch(r"\d+:[0-2]?\d:[0-5]?\d:[0-5]?\d", time):
        fix = "write DD:HH:MM:SS, in quotes: 'trainer.max_time=\"00:01:30:00\"' is an hour and a half"
        yield UserError(f"trainer.max_time={time}: expected DD:HH:MM:SS", fix)


def _names(config: dict[str, Any]) -> Iterator[UserError]:
    name, seed, runs = config["name"], config["seed"], Path(config["runs_dir"])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "my-run"
        yield UserError(
            f"name={name!r}: a run's name has letters, digits, '.', '_' and '-', starts with a letter or digit, "
            "and is at most 100 long",
            f"use name={plain}",
        )
    if not 0 <= seed < 2**32:
        yield UserError(f"seed={seed}: must be from 0 to {2**32 - 1}", "use a smaller seed, such as seed=0")
    if not config["runs_dir"]:
        yield UserError("runs_dir is empty", "name a folder; where TRAINER_RUNS_DIR is set to nothing, unset it")
    if runs.exists() and not runs.is_dir():
        yield UserError(f"runs_dir={runs}: this is a file", "set runs_dir to a directory; it is made when needed")


def _launch(config: dict[str, Any], splits: bool) -> Iterator[TrainerError]:
    from trainer.config.shape import resolve

    try:
        shape = resolve(config)
    except TrainerError as error:
        yield error
        return
    yield from _local_checkpoints(config["checkpoint"], shape.nodes)
    try:
        ranks_in_group(config["strategy"], shape.world_size, shape.processes_per_node)
        if splits and config["data"].get("batch_size") is not None:
            readers = shape.world_size // ranks_per_sample(config["strategy"], shape.processes_per_node)
            accumulate = config["trainer"].get("accumulate_grad_batches")
            plan = BatchPlan.of(config["data"]["batch_size"], config["data"].get("micro_batch"), readers, accumulate)
            yield from problems_of_accumulation(config, plan)
    except UserError as error:
        yield error
    yield from problems_of_combinations(Job(config, shape.world_size, shape.processes_per_node))


def _local_checkpoints(options: dict[str, Any], nodes: int) -> Iterator[UserError]:
    folder, every = options.get("local_dir"), options.get("local_every_n_steps")
    if (folder is None) != (every is None):
        missing, fix = ("local_dir", "/tmp/checkpoints") if folder is None else ("local_every_n_steps", "100")
        yield UserError(
            "checkpoint.local_dir and checkpoint.local_every_n_steps go together",
            f"set checkpoint.{missing}={fix}, too",
        )
    if folder is not None and nodes > 1:
        yield UserError(
            f"checkpoint.local_dir={folder}: the ranks of {nodes} nodes cannot read one node's disk",
            "use checkpoint.local_dir=null and a shorter checkpoint.every_n_steps, or one node",
        )
