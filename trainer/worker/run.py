"""One rank, from the run directory to its outcome. Read top to bottom: `run`, `_train`, and what they call."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.callbacks.best import BestMetric
from trainer.callbacks.boundary import Boundary
from trainer.callbacks.clock import StepClock
from trainer.callbacks.metrics import TrainMetrics
from trainer.callbacks.rng import RngState
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO, SaveFailed
from trainer.checkpoint.store import Checkpoint, CheckpointStore
from trainer.config.build import instantiate, load
from trainer.config.schema import Config
from trainer.errors import DONE, JOB_FAILED, NEVER_RESTART, REQUEUE, TrainerError, UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.files import write_atomic
from trainer.tracking.metrics_file import MetricsFile, rewind
from trainer.worker import build, rng
from trainer.worker.heartbeat import Heartbeat
from trainer.worker.process import Rank
from trainer.worker.stop import Request, StopTraining

Group = torch.distributed.ProcessGroup

_NO_GOOD_CHECKPOINT = (
    "every checkpoint of this run is damaged; starting again from step 0 would hide that",
    "the damaged ones are kept as checkpoints/bad-*; start a new run, or restore one from a backup",
)


def run(run_path: Path) -> int:
    """Train one attempt; returns this process's exit code (see "Environment of a worker" in docs/architecture.md)."""
    directory = RunDirectory(run_path)
    rank = Rank.from_environment()
    heartbeat = Heartbeat(directory.live_dir / f"rank-{rank.rank}.json", rank)
    heartbeat.start()
    attempt = Attempt(directory, rank, heartbeat)
    try:
        config = load(directory.config_path)
        group = init_process_group(config, rank)
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
    except (TrainerError, ImportError) as error:
        # The next attempt would fail in the same way: say so, and keep torchrun from trying.
        traceback.print_exc()
        attempt.end("failed", NEVER_RESTART, f"{type(error).__name__}: {error}", every_rank=True)
    except BaseException:
        traceback.print_exc()
        heartbeat.stop("failed")
        return JOB_FAILED
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return DONE


@dataclass
class Attempt:
    """This rank in this attempt of this run, and how it ended."""

    directory: RunDirectory
    rank: Rank
    heartbeat: Heartbeat

    def end(self, outcome: str, exit_code: int, reason: str = "", every_rank: bool = False) -> None:
        """Record the outcome, which the node process turns into the job's exit code."""
        if self.rank.is_first or every_rank:
            record = {
                "outcome": outcome,
                "exit_code": exit_code,
                "reason": reason,
                "step": self.heartbeat.step,
                "rank": self.rank.rank,
                "host": socket.gethostname(),
                "time": time.time(),
            }
            path = self.directory.attempts_dir / f"attempt-{self.rank.attempt:02d}.json"
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(record))
            event = "preempted" if outcome == "requeue" else outcome
            self.directory.event(event, attempt=self.rank.attempt, step=self.heartbeat.step, reason=reason)
            print(f"{outcome} at step {self.heartbeat.step}" + (f": {reason}" if reason else ""), flush=True)
        self.heartbeat.stop(outcome)


def init_process_group(config: Config, rank: Rank) -> Group | None:
    """Join the other ranks before anything slow, and make the CPU group that agreements use; None for one rank."""
    if rank.world_size == 1:
        return None
    timeout = timedelta(seconds=config.resilience.collective_timeout_s)
    device = build.device_of(config, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        torch.distributed.init_process_group("gloo", timeout=timeout)
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def _train(config: Config, attempt: Attempt, group: Group | None) -> None:
    directory, rank, heartbeat = attempt.directory, attempt.rank, attempt.heartbeat
    silence_known_warnings()
    store = CheckpointStore(directory.checkpoints_dir)
    resumed = _newest_checkpoint(store, directory, rank, group)
    unsure = _begin(attempt, resumed) if rank.is_first else []

    rng.seed_all(config.seed)
    data = build.build_data(config, rank)
    module = build.build_module(config, data, lambda: build.total_steps_of(config, data))
    monitor, mode = _monitor(config, module)

    writer = CheckpointWriter(
        store,
        asynchronous=config.checkpoint.asynchronous,
        attempt=rank.attempt,
        on_committed=lambda saved: _after_commit(saved, store, config, mode, attempt),
    )
    best = BestMetric(monitor, mode, heartbeat)

    def save(trainer: Trainer) -> None:
        heartbeat.update(phase="save")
        metrics.pause()
        _save(trainer, config, best, writer)
        metrics.resume()
        heartbeat.update(phase="train")

    total_steps = build.total_steps_of(config, data)
    metrics = TrainMetrics(
        config.trainer.log_every_n_steps,
        data.plan.global_batch,
        data.facts.get("sequence_length"),
        total_steps,
        heartbeat,
        group,
    )
    boundary = Boundary(
        save,
        config.checkpoint,
        config.resilience,
        directory.stop_request,
        lambda: _failed(writer, directory, config),
        config.trainer.max_steps,
        seconds_of(config.trainer.max_time),
        group,
    )
    callbacks: list[Callback] = [
        RngState(config.seed, rank.rank, build.place_in_data(config, rank).rank, group),
        best,
        *[instantiate(node, where=f"callbacks.{name}") for name, node in config.callbacks.items() if node],
        StepClock(metrics, boundary, heartbeat),
        boundary,
    ]
    loggers = _loggers(config, directory, rank, heartbeat, unsure)
    trainer = build.build_trainer(
        config, rank, data.plan, callbacks, loggers, RunCheckpointIO(writer), str(directory.path)
    )
    if rank.is_first:
        _say_what(module, trainer, data.plan, total_steps, config)
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
        _finish(writer, loggers, exit_code, config)


def _newest_checkpoint(
    store: CheckpointStore, directory: RunDirectory, rank: Rank, group: Group | None
) -> Checkpoint | None:
    """The first rank verifies and chooses; the others take its choice, so that all load the same step."""
    chosen: list[Any] = [None]
    if rank.is_first:
        found, skipped = store.newest_good(set_aside=True)
        for message in skipped:
            print(f"checkpoint skipped: {message}", flush=True)
            directory.event("checkpoint_skipped", reason=message)
        chosen = [UserError(*_NO_GOOD_CHECKPOINT) if skipped and found is None else found]
    if group is not None:
        torch.distributed.broadcast_object_list(chosen, src=0, group=group)
    if isinstance(chosen[0], UserError):
        raise chosen[0]
    return chosen[0]


def _begin(attempt: Attempt, resumed: Checkpoint | None) -> list[dict[str, Any]]:
    """What the first rank writes down before training, and takes back of what the last attempt logged too far.

    Returns the lines of metrics.jsonl that the last attempt, if it was killed, may not have got to another tracker.
    """
    step = resumed.step if resumed else 0
    rewound = rewind(attempt.directory.metrics_path, step)
    if rewound.dropped:
        print(f"metrics.jsonl: {rewound.dropped} lines after step {step} dropped; they are logged again", flush=True)
    attempt.heartbeat.update(step=step, phase="build")
    attempt.directory.event(
        "started",
        attempt=attempt.rank.attempt,
        step=step,
        world_size=attempt.rank.world_size,
        host=socket.gethostname(),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
    )
    print(
        f"attempt {attempt.rank.attempt}: " + (f"resumed from step {step}" if resumed else "from the start"),
        flush=True,
    )
    ended_well = any(
        record["attempt"] == attempt.rank.attempt - 1 and record["outcome"] in ("finished", "stopped", "requeue")
        for record in attempt.directory.attempts()
    )
    return [] if ended_well else rewound.recent


def _monitor(config: Config, module: LightningModule) -> tuple[str, str]:
    """The metric that says which checkpoint is best: the config's, the task's own, or val/loss."""
    monitor, mode = getattr(module, "primary_metric", ("val/loss", "min"))
    if config.checkpoint.monitor is not None:
        monitor, mode = config.checkpoint.monitor, "min"
    return monitor, config.checkpoint.mode or mode


def _loggers(
    config: Config, directory: RunDirectory, rank: Rank, heartbeat: Heartbeat, unsure: list[dict[str, Any]]
) -> list[Any]:
    """metrics.jsonl always, W&B where asked for; only the first rank writes."""
    if not rank.is_first:
        return []
    loggers: list[Any] = [MetricsFile(directory.metrics_path, lambda: heartbeat.step)]
    if config.tracking.name == "wandb":
        from trainer.tracking import weights_and_biases

        loggers.append(
            weights_and_biases.start(directory, config.tracking, directory.config(), lambda: heartbeat.step, unsure)
        )
    return loggers


def _save(trainer: Trainer, config: Config, best: BestMetric, writer: CheckpointWriter) -> None:
    """One checkpoint of the state after `trainer.global_step` steps, on every rank."""
    for logger in trainer.loggers:
        logger.save()
    step = trainer.global_step
    trainer.save_checkpoint(
        writer.store.path(step),
        storage_options={
            "step": step,
            "epoch": trainer.current_epoch,
            **best.measured_at(step),
            "world_size": trainer.world_size,
            "strategy": config.strategy.name,
        },
    )


def _failed(writer: CheckpointWriter, directory: RunDirectory, config: Config) -> bool:
    """Whether a save has failed and the training must end for it. Only the rank that writes knows."""
    failure = writer.take_failure()
    if failure is None:
        return False
    directory.event("checkpoint_failed", reason=str(failure))
    return config.checkpoint.on_failure == "stop"


def _after_commit(saved: Checkpoint, store: CheckpointStore, config: Config, mode: str, attempt: Attempt) -> None:
    # The supervisor counts restarts from the attempt that got this far (trainer/cluster/node.py).
    attempt.directory.event("checkpoint", attempt=attempt.rank.attempt, step=saved.step, bytes=saved.bytes)
    options = config.checkpoint
    store.prune(options.keep_last, options.keep_best, mode, options.keep_every_n_steps)


def _finish(writer: CheckpointWriter, loggers: list[Any], exit_code: int, config: Config) -> None:
    """Drain the background write, then end the loggers. A late failure of a save is as loud as an early one."""
    try:
        writer.wait()
        if config.checkpoint.on_failure == "stop":
            writer.raise_if_failed()
    finally:
        for logger in loggers:
            logger.finalize("success" if exit_code == 0 else "failed")
            if not isinstance(logger, MetricsFile):
                from trainer.tracking import weights_and_biases

                weights_and_biases.finish(logger, exit_code)


def _say_what(module: LightningModule, trainer: Trainer, plan: Any, total_steps: int | None, config: Config) -> None:
    """One line of what trains on what."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{parameters:,} parameters, {config.strategy.name} on {trainer.world_size} ranks, {trainer.precision}, "
        f"global batch {plan.global_batch} = {plan.world_size} ranks x {plan.micro_batch} x {plan.accumulate}, "
        f"{total_steps if total_steps is not None else 'unlimited'} steps",
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


def silence_known_warnings() -> None:
    """Advice of Lightning that does not hold here, each with the reason. Nothing broader: new ones must be seen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its "GPU available", tips and adverts
    reasons = {
        "The `srun` command is available on your system but is not used": "torchrun starts the ranks, under srun too",
        ".*isinstance\\(treespec, LeafSpec\\)": "Lightning 2.6 with torch 2.13; gone with Lightning's next release",
        "It is recommended to use `self.log\\(.*sync_dist=True": "the tasks reduce over the ranks themselves",
        "The .*dataloader.* does not have many workers": "whether workers pay depends on the data: docs/data.md",
        "The number of training batches .* is smaller than the logging": "our logging counts steps over epochs",
        "Be aware that when using `ckpt_path`, callbacks": "an evaluation needs none of them",
        "You defined a `validation_step` but have no `val_dataloader`": "a data module may have no validation",
    }
    for message in reasons:
        warnings.filterwarnings("ignore", message=message)
