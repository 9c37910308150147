"""One rank, from the run directory to its outcome. Read top to bottom: `run`, `_train`, and what they call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.callbacks import users, watching
from trainer.callbacks.best import BestMetric, primary_metric_of
from trainer.callbacks.boundary import Boundary
from trainer.callbacks.clock import StepClock
from trainer.callbacks.in_memory import InMemory
from trainer.callbacks.metrics import TrainMetrics
from trainer.callbacks.rng import RngState
from trainer.checkpoint import tiers
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO, SaveFailed
from trainer.checkpoint.store import Checkpoint, CheckpointStore
from trainer.config.schema import Config
from trainer.core.errors import DONE, JOB_FAILED, REQUEUE, UserError
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runtime import failure, hydra_state, logs, memory, micro_batch, rng
from trainer.runtime.attempt import Attempt
from trainer.runtime.flight_recorder import FlightRecorder, Timeouts
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.runtime.stop import Request, StopTraining
from trainer.runtime.torch_setup import Group, device_of, init_process_group, silence_known_warnings
from trainer.tracking.loggers import Loggers
from trainer.train import build, fine_tuning, late, manual, moments, resuming
from trainer.train.data import Data
from trainer.train.saving import Saving

_NO_GOOD_CHECKPOINT = (
    "every checkpoint of this run is damaged; starting again from step 0 would hide that",
    "the damaged ones are kept as checkpoints/bad-*; start a new run, or restore one from a backup",
)


def run(run_path: Path) -> int:
    """Train one attempt; returns this process's exit code (see "Environment of a worker" in docs/architecture.md)."""
    directory = RunDirectory(run_path)
    rank = Rank.from_environment()
    heartbeat = Heartbeat(directory, rank)
    heartbeat.start()
    attempt = Attempt(directory, rank, heartbeat)
    try:
        config = hydra_state.load(directory)
        group = init_process_group(config, rank, Timeouts(config.resilience).first_s)
        if group is not None:
            heartbeat.on_beat = FlightRecorder(directory, rank).look
        _train(config, attempt, group)
        attempt.end("finished", DONE)
    except StopTraining as leaving:
        if leaving.request is Request.SAVE_FAILED:
            attempt.end("failed", JOB_FAILED, "a checkpoint could not be written; see the log")
        elif leaving.request is Request.STOP:
            attempt.end("stopped", DONE, "asked to stop")
        else:
            attempt.end("requeue", REQUEUE, "asked to make room")
    except SaveFailed as error:
        attempt.end("failed", JOB_FAILED, str(error))
    except memory.ERRORS as error:
        failure.print_traceback(error)
        code = memory.end(attempt, config.resilience.on_oom)
        if code is not None:
            return code
    except BaseException as error:
        code = failure.conclude(error, attempt)
        if code != DONE:
            return code
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return DONE


def _train(config: Config, attempt: Attempt, group: Group | None) -> None:
    directory, rank, heartbeat = attempt.directory, attempt.rank, attempt.heartbeat
    silence_known_warnings()
    logs.start(directory.config())
    hydra_state.configure_logging(directory)
    store = CheckpointStore(directory.checkpoints_dir)
    folder = tiers.local_folder(config.checkpoint.local_dir, directory.path.name)
    local = CheckpointStore(folder) if folder else None
    resumed = _newest_checkpoint(store, local, directory, rank, group)
    attempt.first_step = resumed.step if resumed else 0
    heartbeat.update(step=attempt.first_step, phase="build")
    unsure = attempt.begin(resumed) if rank.is_first else []

    readers = build.place_in_data(config, rank).world_size
    config.data = micro_batch.limited(config.data, directory, rank, readers, group)
    writer = CheckpointWriter(
        store,
        asynchronous=config.checkpoint.asynchronous,
        attempt=rank.attempt,
        on_committed=lambda saved: _after_commit(saved, store, local, config, attempt),
    )
    trainer = build.build_trainer(config, rank, RunCheckpointIO(writer), str(directory.path))
    rng.seed_all(config.seed)
    data = build.build_data(config, rank, trainer, group)
    callbacks: list[Callback] = []
    module = build.build_module(
        config, data, lambda: build.total_steps_of(config, data, callbacks), defer=build.defers(config, rank)
    )
    data.set_up(module)
    attempt.plan = data.plan
    if resumed is None:
        late.once_built(module, lambda: fine_tuning.take_weights(module, config.finetune, say=rank.is_first))
    own = resuming.settled(users.build(config.callbacks), resumes=resumed is not None)
    total_steps = config.trainer.max_steps
    if module.automatic_optimization:
        total_steps = build.total_steps_of(config, data, own)
    best = BestMetric(config.checkpoint, primary_metric_of(module), store, heartbeat, group)
    saving = Saving(config, attempt, writer, store, local, best)
    boundary = _add_callbacks(callbacks, own, saving, config, attempt, data, total_steps, group)
    loggers = Loggers(config, directory, rank, counted=lambda: heartbeat.step, unsure=unsure, group=group)
    build.complete(trainer, callbacks, loggers.all)
    loggers.axis.trainer = trainer
    manual.adapt(trainer, module, data.plan)
    moments.act_at_moments(trainer, boundary)
    watching.count_waits(trainer, heartbeat)
    if rank.is_first:
        late.once_built(module, lambda: _say_what(module, trainer, data.plan, total_steps, config))
    exit_code = 1
    try:
        trainer.fit(
            module,
            datamodule=data.module,
            ckpt_path=str(resumed.path) if resumed else None,
            weights_only=True,
        )
        exit_code = 0
    finally:
        _finish(writer, loggers, exit_code, config, heartbeat)
    if rank.is_first:
        tiers.remove_local(local)


def _add_callbacks(
    callbacks: list[Callback],
    own: list[Callback],
    saving: Saving,
    config: Config,
    attempt: Attempt,
    data: Data,
    total_steps: int | None,
    group: Group | None,
) -> Boundary:
    """Put the user's `own` callbacks and ours into `callbacks`, in the order in which they are called.

    Returns the last of them, which stops and saves.
    """
    directory, rank, heartbeat = attempt.directory, attempt.rank, attempt.heartbeat
    metrics = TrainMetrics(
        config.trainer.log_every_n_steps,
        data.plan.global_batch / data.plan.accumulate,
        data.facts.get("sequence_length"),
        total_steps,
        heartbeat,
        group,
    )
    generators = RngState(config.seed, rank.rank, build.place_in_data(config, rank).rank, group)
    in_memory = InMemory(rank.rank, group)
    boundary = Boundary(
        saving.save,
        config.checkpoint,
        config.resilience,
        directory.stop_request,
        saving.has_failed,
        config.trainer.max_steps,
        seconds_of(config.trainer.max_time),
        group,
        save_locally=saving.save_locally if saving.saves_locally else None,
        best=saving.best,
        save_final=saving.save_final,
        after_start=[generators.restore_again, in_memory.restore_again],
    )
    clock = StepClock(metrics, boundary, heartbeat, Timeouts(config.resilience))
    guard = watching.make_guard(config.resilience, directory, rank.attempt, group)
    saving.metrics, saving.clock, saving.guard = metrics, clock, guard
    callbacks += [
        generators,
        in_memory,
        saving.best,
        *own,
        *watching.callbacks(attempt, data.plan, device_of(config, rank), build.waits_in_forward(config, rank)),
        *([guard] if guard else []),
        clock,
        boundary,
    ]
    return boundary


def _newest_checkpoint(
    store: CheckpointStore,
    local: CheckpointStore | None,
    directory: RunDirectory,
    rank: Rank,
    group: Group | None,
) -> Checkpoint | None:
    """The first rank verifies and chooses; the others take its choice, so that all load the same step."""
    chosen: list[Any] = [None]
    if rank.is_first:
        starts = [(event.time, event.step) for event in directory.events_of(events.Started)]
        found, skipped = tiers.newest_good(store, local, starts)
        for message in skipped:
            print(f"checkpoint skipped: {message}", flush=True)
            directory.add_event(events.CheckpointSkipped(reason=message))
        chosen = [UserError(*_NO_GOOD_CHECKPOINT) if skipped and found is None else found]
    if group is not None:
        torch.distributed.broadcast_object_list(chosen, src=0, group=group)
    if isinstance(chosen[0], UserError):
        raise chosen[0]
    return chosen[0]


def _after_commit(
    saved: Checkpoint,
    store: CheckpointStore,
    local: CheckpointStore | None,
    config: Config,
    attempt: Attempt,
) -> None:
    # The supervisor counts restarts from the attempt that got this far (trainer/supervise/supervisor.py).
    attempt.directory.add_event(
        events.CheckpointSaved(attempt=attempt.rank.attempt, step=saved.step, bytes=saved.bytes)
    )
    options = config.checkpoint
    if local is not None and saved.path.parent == local.directory:
        local.prune(options.local_keep_last)
        return
    store.prune(options.keep_last, options.keep_best, keep_every_n_steps=options.keep_every_n_steps)


def _finish(writer: CheckpointWriter, loggers: Loggers, exit_code: int, config: Config, heartbeat: Heartbeat) -> None:
    """Drain the background write, then end the loggers. A late failure of a save is as loud as an early one."""
    heartbeat.update(phase="finish")
    try:
        writer.wait()
        if config.checkpoint.on_failure == "stop":
            writer.raise_if_failed()
    finally:
        loggers.finish(exit_code)


def _say_what(module: LightningModule, trainer: Trainer, plan: Any, total_steps: int | None, config: Config) -> None:
    """One line of what trains on what."""
    sizes = [(late.size_of(parameter), parameter.requires_grad) for parameter in module.parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    ranks = "1 rank" if trainer.world_size == 1 else f"{trainer.world_size} ranks"
    some = f" ({trained:,} of them trained)" if trained < parameters else ""
    print(
        f"{parameters:,} parameters{some}, {config.strategy.name} on {ranks}, {trainer.precision}, "
        f"global batch {plan.global_batch} = {plan.split(trainer.world_size)}, "
        + (f"{total_steps} steps" if total_steps is not None else f"{config.trainer.max_epochs or 'unlimited'} epochs"),
        flush=True,
    )


def seconds_of(text: str | None) -> float | None:
    """`DD:HH:MM:SS` (leading parts may be missing) in seconds."""
    if text is None:
        return None
    seconds = 0.0
    for part, unit in zip(reversed(str(text).split(":")), (1, 60, 3600, 86400), strict=False):
        seconds += float(part) * unit
    return seconds
