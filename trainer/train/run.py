"""One rank of a training attempt, from the run directory to its outcome. Read top to bottom.

`run` calls `train`, which builds everything and calls Lightning's `Trainer.fit`. `Trainer.fit` runs
`SavePointFitLoop` (train/save_points.py) over epochs, and `LeanTrainingEpochLoop.advance` (train/loop.py) over
micro-batches: that is the training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer import strategies
from trainer.callbacks import monitoring, user_callbacks
from trainer.callbacks.best import BestMetric, primary_metric_of
from trainer.callbacks.boundary import Boundary, BoundaryOptions
from trainer.callbacks.clock import StepClock
from trainer.callbacks.metrics import BatchWork, TrainMetrics
from trainer.callbacks.node_metrics import MOST_NODES, NodeMetrics
from trainer.callbacks.rng import RngState
from trainer.callbacks.transient_state import TransientState
from trainer.checkpoint import node_disk, node_record, tiers
from trainer.checkpoint.host_copies import MIB, CopyOptions
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO, SaveFailed, SaveTiming
from trainer.checkpoint.node_disk import NodeDisk
from trainer.checkpoint.remote import RemoteStore
from trainer.checkpoint.store import Checkpoint, CheckpointStore, best_of, step_of
from trainer.checkpoint.uploads import Uploads
from trainer.config.batch import BatchPlan
from trainer.config.schema import Config
from trainer.core.errors import DONE, JOB_FAILED, REQUEUE
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.lock import refuse_if_superseded
from trainer.runs.node_folder import NodeFolder
from trainer.runs.remote_checkpoints import remote_of
from trainer.runtime import failure, hydra_state, logs, memory, micro_batch, rng
from trainer.runtime.abort import abort_nccl
from trainer.runtime.attempt import Attempt
from trainer.runtime.first_step import StartClock
from trainer.runtime.flight_recorder import FlightRecorder, Timeouts
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.runtime.stop import Request, StopTraining
from trainer.runtime.torch_setup import Group, device_of, init_process_group, silence_known_warnings
from trainer.tracking.loggers import AttemptEnd, Loggers
from trainer.train import (
    build,
    deferred_modules,
    find_micro_batch,
    fine_tuning,
    flops,
    manual_optimization,
    newest_checkpoint,
    node_checkpoints,
    resume_callbacks,
    save_points,
)
from trainer.train.checkpoint_contents import CheckpointSaver, Stores
from trainer.train.data import Data
from trainer.train.precision import precision_note

_ENDS: dict[Request, AttemptEnd] = {Request.STOP: "stopped", Request.REQUEUE: "preempted"}


def run(run_path: Path) -> int:
    """Train one attempt and record its outcome.

    Returns:
        The exit code of this process (see "How an attempt ends" in docs/architecture.md).
    """
    directory = RunDirectory(run_path)
    rank = Rank.from_environment()
    heartbeat = Heartbeat(directory, rank)
    heartbeat.start()
    attempt = Attempt(directory, rank, heartbeat)
    start = StartClock(attempt)
    if rank.is_first:
        heartbeat.on_phase = start.follow
    try:
        config = hydra_state.load(directory)
        config.strategy = strategies.resolved(config.strategy, rank.world_size, device_of(config, rank).type)
        start.end("config")
        group = init_process_group(config, rank, Timeouts(config.resilience).first_s)
        start.end("rendezvous")
        if group is not None:
            heartbeat.on_beat = FlightRecorder(directory, rank).check
        train(config, attempt, group, start)
        attempt.end("finished", DONE)
    except StopTraining as stopped:
        if stopped.request is Request.SAVE_FAILED:
            attempt.end("failed", JOB_FAILED, _failed_save(attempt))
        elif stopped.request is Request.STOP:
            attempt.end("stopped", DONE, "stop requested")
        else:
            attempt.end("requeue", REQUEUE, "preempted")
    except SaveFailed as error:
        attempt.end("failed", JOB_FAILED, str(error), every_rank=True)
    except find_micro_batch.TooLarge as error:
        return failure.restart(attempt, str(error))
    except BaseException as error:
        if not memory.is_exhausted(error):
            return failure.conclude(error, attempt)
        abort_nccl()
        failure.print_traceback(error)
        code = memory.end(attempt, config.resilience.on_oom)
        return DONE if code is None else code
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return DONE


def _failed_save(attempt: Attempt) -> str:
    """Return why a checkpoint could not be written, as the rank recorded it that wrote it."""
    failed = [
        one for one in attempt.directory.events_of(events.CheckpointFailed) if one.attempt == attempt.rank.attempt
    ]
    return failed[-1].reason if failed else "a checkpoint could not be written; see the log"


@dataclass(frozen=True)
class _Job:
    """Objects that all parts of an attempt share."""

    config: Config
    attempt: Attempt
    group: Group | None
    """CPU (gloo) group of all ranks; None for one rank."""
    stores: Stores

    @property
    def rank(self) -> Rank:
        return self.attempt.rank

    @property
    def directory(self) -> RunDirectory:
        return self.attempt.directory


def train(config: Config, attempt: Attempt, group: Group | None, start: StartClock) -> None:
    """Build data, model, callbacks and loggers, and train from the newest good checkpoint. Collective."""
    silence_known_warnings()
    logs.start(attempt.directory.config())
    hydra_state.configure_logging(attempt.directory)
    rank, heartbeat, run_path = attempt.rank, attempt.heartbeat, attempt.directory.path
    job = _Job(config, attempt, group, _open_stores(config, attempt))

    checkpoint = newest_checkpoint.choose(attempt, job.stores, group, config.strategy.name)
    attempt.first_step = checkpoint.step if checkpoint else 0
    heartbeat.update(step=attempt.first_step, phase="build")
    unsure_lines = attempt.begin(checkpoint) if rank.is_first else []

    data_ranks = build.place_in_data(config, rank).world_size
    if config.trainer.find_micro_batch and checkpoint is None:
        find_micro_batch.find(config, attempt, group)
    config.data = micro_batch.limited(config.data, attempt.directory, rank, data_ranks, group)
    writer = _make_writer(job)
    trainer = build.build_trainer(config, rank, RunCheckpointIO(writer), str(run_path))
    rng.seed_all(config.seed)
    start.end("build")
    data = build.build_data(config, rank, trainer, group)
    start.end("data")
    callbacks: list[Callback] = []  # filled below: the scheduler needs the total steps only when training starts
    module = build.build_module(
        config, data, lambda: build.total_steps_of(config, data, callbacks), deferral=build.deferral_of(config, rank)
    )
    build.convert_to_float8(module, config, rank)
    start.end("build")
    data.set_up(module)
    start.end("data")
    attempt.plan = data.plan
    if checkpoint is None:
        deferred_modules.call_when_built(
            module, lambda: fine_tuning.load_initial_weights(module, config.finetune, log=rank.is_first)
        )

    users = resume_callbacks.prepare(user_callbacks.build(config.callbacks), resumes=checkpoint is not None)
    total_steps = config.trainer.max_steps
    if module.automatic_optimization:
        total_steps = build.total_steps_of(config, data, users)
    best = BestMetric(config.checkpoint, primary_metric_of(module), job.stores.run, heartbeat, group)
    saver = CheckpointSaver(config, attempt, writer, job.stores, best)
    ordered, boundary = _make_callbacks(job, data, saver, users, total_steps)
    deferred_modules.call_when_built(module, lambda: flops.set_mfu(saver.metrics, module, config, rank, data.facts))
    callbacks.extend(ordered)
    loggers = Loggers(config, attempt.directory, rank, counted=lambda: heartbeat.step, unsure=unsure_lines, group=group)
    writer.on_committed = lambda checkpoint: _after_commit(job, checkpoint, writer.timing, loggers)
    build.complete(trainer, [*loggers.callbacks(), *callbacks], loggers.all)
    loggers.axis.trainer = trainer
    manual_optimization.configure(trainer, module, data.plan)
    save_points.set_save_point_handler(trainer, boundary)
    monitoring.report_data_wait(trainer, heartbeat)
    if rank.is_first:
        deferred_modules.call_when_built(
            module, lambda: _print_summary(module, trainer, data.plan, total_steps, config)
        )
        deferred_modules.call_when_built(module, lambda: loggers.describe(_sizes(module)))

    start.end("build")
    end: AttemptEnd = "failed"
    try:
        trainer.fit(
            module,
            datamodule=data.module,
            ckpt_path=str(checkpoint.path) if checkpoint else None,
            weights_only=True,
        )
        end = "finished"
    except StopTraining as stopped:
        end = _ENDS.get(stopped.request, "failed")
        raise
    finally:
        _finish(job, writer, loggers, end)
    if rank.local_rank == 0:
        tiers.remove_local(job.stores.local)
    if rank.is_first:
        node_record.remove(job.stores.run.directory)


def _open_stores(config: Config, attempt: Attempt) -> Stores:
    """Open the run's checkpoints and, if they are configured, those on this node's disk and in an object store."""
    directory, rank = attempt.directory, attempt.rank
    folder = tiers.local_folder(config.checkpoint.local_dir, directory.path.name)
    run = directory.identity()
    local = disk = None
    if folder is not None:
        tiers.own_folder(folder)
        if rank.num_nodes > 1:
            folder = tiers.own_folder(node_disk.folder_of(folder, rank.rank // rank.local_world_size))
            disk = NodeDisk(folder, rank.local_rank, rank.local_world_size)
        local = CheckpointStore(folder, run, strict=True)
    store = CheckpointStore(directory.checkpoints_dir, run)
    uploads = None
    if (remote := remote_of(directory, config.checkpoint.dir)) is not None:
        remote.may_write = lambda: refuse_if_superseded(directory, rank.attempt)
        uploads = Uploads(remote, rank.rank, rank.world_size, lambda path: _after_upload(config, attempt, remote, path))
        uploads.on_wait = attempt.heartbeat.count_progress
    return Stores(store, local, disk, uploads)


def _after_upload(config: Config, attempt: Attempt, remote: RemoteStore, path: Path) -> None:
    """Record a checkpoint that is in the object store, and delete old ones there."""
    attempt.directory.add_event(events.CheckpointUploaded(attempt=attempt.rank.attempt, step=step_of(path)))
    options = config.checkpoint
    remote.record(remote.prune(options.keep_last, options.keep_best, options.keep_every_n_steps))


def _make_writer(job: _Job) -> CheckpointWriter:
    """Return the writer of checkpoints."""
    options = job.config.checkpoint
    writer = CheckpointWriter(
        job.stores.run,
        asynchronous=options.asynchronous,
        attempt=job.rank.attempt,
        copies=CopyOptions(options.snapshot, options.buffer_mb * MIB, job.rank.local_world_size),
        uploads=job.stores.uploads,
        disk=job.stores.disk,
    )
    writer.on_committed = lambda checkpoint: _after_commit(job, checkpoint, writer.timing)
    return writer


def _after_commit(job: _Job, checkpoint: Checkpoint, timing: SaveTiming, loggers: Loggers | None = None) -> None:
    """Record a committed checkpoint, and delete old ones: on rank 0, and on the first rank of a node its own."""
    # The supervisor counts restarts from the attempt that got this far (trainer/supervise/supervisor.py).
    saved = events.CheckpointSaved(
        attempt=job.rank.attempt,
        step=checkpoint.step,
        bytes=checkpoint.bytes,
        blocked_s=round(timing.blocked_s, 3),
        written_s=round(timing.written_s, 3),
    )
    if job.rank.is_first:
        job.directory.add_event(saved)
    options, local = job.config.checkpoint, job.stores.local
    if local is not None and checkpoint.path.parent == local.directory:
        node_checkpoints.after_save(job.stores, job.rank, checkpoint, options.local_keep_last)
        return
    if loggers is not None:
        loggers.checkpoint_saved(checkpoint, lambda: _is_best(job, checkpoint))
    job.stores.run.prune(
        options.keep_last,
        options.keep_best,
        keep_every_n_steps=options.keep_every_n_steps,
        busy=job.stores.uploads.names() if job.stores.uploads is not None else (),
    )


def _is_best(job: _Job, checkpoint: Checkpoint) -> bool:
    best = best_of(job.stores.run.committed(), mode=checkpoint.mode or "min")
    return best is not None and best.step == checkpoint.step


def _make_callbacks(
    job: _Job, data: Data, saver: CheckpointSaver, users: list[Callback], total_steps: int | None
) -> tuple[list[Callback], Boundary]:
    """Return all callbacks, in the order in which they are called, and the last of them, which saves and stops."""
    config, rank, heartbeat, group = job.config, job.rank, job.attempt.heartbeat, job.group
    work = BatchWork(data.plan.global_batch / data.plan.accumulate, data.facts.get("sequence_length"))
    gpus = monitoring.gpu_metrics(heartbeat, device_of(config, rank))
    nodes = NodeMetrics(rank, device_of(config, rank)) if 1 < rank.num_nodes <= MOST_NODES else None
    metrics = TrainMetrics(
        config.trainer.log_every_n_steps, work, total_steps, heartbeat, group, gpus=gpus, nodes=nodes
    )
    rng_state = RngState(config.seed, rank.rank, build.place_in_data(config, rank).rank, group)
    transient_state = TransientState(rank.rank, group)
    boundary = Boundary(
        saver,
        BoundaryOptions(
            config.checkpoint,
            config.resilience,
            (NodeFolder.of_this_rank() or job.directory).stop_request,
            config.trainer.max_steps,
            seconds_of(config.trainer.max_time),
        ),
        group,
        after_train_start=[rng_state.restore_again, transient_state.restore_again],
    )
    clock = StepClock(metrics, boundary, heartbeat, Timeouts(config.resilience))
    guard = monitoring.make_guard(config.resilience, job.directory, rank.attempt, group)
    saver.metrics, saver.clock, saver.guard = metrics, clock, guard
    waits_in_forward = build.waits_in_forward(config, rank)
    callbacks: list[Callback] = [
        rng_state,
        transient_state,
        saver.best,
        *users,
        *monitoring.make_callbacks(job.attempt, data.plan, device_of(config, rank), waits_in_forward),
        *monitoring.make_profiler(config.trainer, job.attempt),
        *([guard] if guard else []),
        clock,
        boundary,
    ]
    return callbacks, boundary


def _finish(job: _Job, writer: CheckpointWriter, loggers: Loggers, end: AttemptEnd) -> None:
    """Wait for the background write, then finish the loggers. A failed write is reported like one during training."""
    job.attempt.heartbeat.update(phase="finish")
    try:
        writer.finish()
        if job.config.checkpoint.on_failure == "stop":
            writer.raise_if_failed()
    finally:
        loggers.finish(end)


def _print_summary(
    module: LightningModule, trainer: Trainer, plan: BatchPlan, total_steps: int | None, config: Config
) -> None:
    """Print one line: parameters, strategy, precision, batch and length."""
    parameters, trained = _sizes(module).values()
    ranks = "1 rank" if trainer.world_size == 1 else f"{trainer.world_size} ranks"
    some = f" ({trained:,} trainable)" if trained < parameters else ""
    print(
        f"{parameters:,} parameters{some}, {config.strategy.name} on {ranks}, {trainer.precision}, "
        f"global batch {plan.global_batch} = {plan.split(trainer.world_size)}, "
        + (f"{total_steps} steps" if total_steps is not None else f"{config.trainer.max_epochs or 'unlimited'} epochs"),
        flush=True,
    )
    note = precision_note(config, str(trainer.precision))
    if note is not None:
        print(note, flush=True)


def _sizes(module: LightningModule) -> dict[str, int]:
    """Return the number of parameters, and of those that are trained."""
    sizes = [(deferred_modules.num_elements(parameter), parameter.requires_grad) for parameter in module.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, learns in sizes if learns),
    }


def seconds_of(text: str | None) -> float | None:
    """Return the seconds of `DD:HH:MM:SS`; leading parts may be left out."""
    if text is None:
        return None
    seconds = 0.0
    for part, unit in zip(reversed(str(text).split(":")), (1, 60, 3600, 86400), strict=False):
        seconds += float(part) * unit
    return seconds
