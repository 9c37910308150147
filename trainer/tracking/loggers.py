"""The loggers of a run, the same list on every rank; `trainer.logger` is the first of them.

User-defined loggers (section `logger`) come first, then W&B, or `NoLogger` if there is neither; `metrics.jsonl` is
always the last. Only the first rank writes: on the others Lightning's loggers, and these, do nothing, and their
experiment accepts any call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from trainer.checkpoint.store import Checkpoint
from trainer.config.schema import Config
from trainer.core.secrets import mask
from trainer.runs.bill import in_summary
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking
from trainer.runs.summary import best as best_of_run
from trainer.runtime.process import Rank
from trainer.runtime.steps import steps_taken
from trainer.tracking import user_loggers, wandb_artifacts
from trainer.tracking.client_settings import DEFAULT_PROJECT
from trainer.tracking.histograms import Histograms
from trainer.tracking.metrics_file import MetricsFile
from trainer.tracking.no_logger import NoLogger, Nothing
from trainer.tracking.wandb_alerts import TroubleAlerts
from trainer.tracking.wandb_facts import KEY as FACTS
from trainer.tracking.wandb_facts import Extremes, facts_of
from trainer.tracking.wandb_identity import identity
from trainer.tracking.wandb_stop import TagWatch
from trainer.tracking.weights_and_biases import Position, finish, masked, start

AttemptEnd = Literal["finished", "stopped", "preempted", "failed"]
"""How an attempt ended."""
_BILL_EVERY_S = 60.0
"""Least time between two bills that are logged at checkpoints."""


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Print an exception of W&B's client instead of raising it: it is no reason to fail the training."""
    try:
        yield
    except Exception as error:
        print(f"wandb: {what} was not logged: {type(error).__name__}: {error}", flush=True)


class StepAxis:
    """The x axis of every logger: completed optimizer steps, for training and validation alike.

    Lightning counts them differently (the 50th step's metrics are logged at 49, the validation after it at 50). A step
    that the user sets, by `self.log("step", ...)` or as an argument, is kept.

    Args:
        counted: Returns the completed optimizer steps of the heartbeat.
    """

    def __init__(self, counted: Callable[[], int]) -> None:
        self._counted = counted
        self.trainer: Trainer | None = None
        """Set once the Trainer is built."""

    def completed_steps(self) -> int:
        """Return the completed optimizer steps.

        The larger of the heartbeat's count and Lightning's own: Lightning's callbacks run before ours at the end of a
        step.
        """
        if self.trainer is None or self.trainer.lightning_module is None:
            return self._counted()
        return max(self._counted(), steps_taken(self.trainer))

    def step(self, given: int | None) -> int:
        """Return the step to log at, for the step that Lightning gives."""
        if given is None or self.trainer is None or given == self.trainer.fit_loop.epoch_loop._batches_that_stepped:
            return self.completed_steps()
        return given


class WandbCurves(WandbLogger):
    """The W&B run of a run as Lightning's WandbLogger; `experiment` is None on all ranks but the first.

    Args:
        experiment: wandb's Run; None on the other ranks.
        axis: The x axis.
        run: The run directory.
        names: Project, id and name of the W&B run.
    """

    def __init__(self, experiment: Any, axis: StepAxis, run: RunDirectory, names: Mapping[str, Any]) -> None:
        self._run_directory = run
        self._extremes = Extremes(run.metrics_path) if experiment is not None else None
        super().__init__(
            experiment=experiment,
            save_dir=str(run.path),
            project=names["project"],
            id=names["id"],
            name=names.get("name"),
            log_model=False,
        )
        self._axis = axis

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at the completed optimizer steps."""
        super().log_metrics(metrics, step=self._axis.step(step))
        if self._extremes is not None:
            self._extremes.add(metrics)

    @property
    def experiment(self) -> Any:
        """Wandb's Run; on the other ranks an object that accepts any call at any depth."""
        return super().experiment if getattr(rank_zero_only, "rank", 0) == 0 else Nothing()

    @rank_zero_only
    def save(self) -> None:
        """Update the extremes in the summary of the W&B run, at each checkpoint and at the end."""
        if self._extremes is not None:
            best = best_of_run(self._run_directory, self._run_directory.heartbeat(0))
            with reported("the summary"):
                self.experiment.summary.update(self._extremes.summary(best))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log hyperparameters with secrets masked."""
        super().log_hyperparams(masked(dict(params) if isinstance(params, Mapping) else vars(params)))


class Loggers:
    """The loggers of one attempt; `all` is passed to Lightning's Trainer. The constructor is collective.

    Args:
        config: The config of the run.
        run: The run directory.
        rank: This rank.
        counted: Returns the completed optimizer steps of the heartbeat.
        unsure: Lines of `metrics.jsonl` that may not have reached W&B.
        group: The CPU process group.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        rank: Rank,
        *,
        counted: Callable[[], int],
        unsure: list[Any],
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.axis = StepAxis(counted)
        self._run = run
        self._experiment: Any = None
        self._facts: dict[str, Any] = {}
        self._options = config.tracking
        self._tags: TagWatch | None = None
        self._alerts: TroubleAlerts | None = None
        self._next_bill = 0.0
        own = user_loggers.build(config.logger, run, counted(), rank.is_first, group)
        shown = [user_loggers.at_steps(logger, self.axis.step) for logger in own]
        if config.tracking.name == "wandb":
            names = {"project": DEFAULT_PROJECT, "id": run.id, **identity(run, config.tracking)}
            if rank.is_first:
                before = run.outcome(rank.attempt - 1)
                ended_well = before is not None and before.outcome in ("finished", "stopped", "requeue")
                position = Position(counted(), self.axis.completed_steps, unsure, ended_well)
                self._facts = facts_of(run, rank.world_size)
                self._experiment = start(run, config.tracking, {**run.config(), FACTS: self._facts}, position)
                names = {**names, "project": self._experiment.project, "id": self._experiment.id}
                self._begin()
            shared = [names]
            if group is not None:  # under `wandb agent` only the client knows them
                torch.distributed.broadcast_object_list(shared, src=0, group=group)
            names = shared[0]
            shown.append(WandbCurves(self._experiment, self.axis, run, names))
        shown = shown or [NoLogger(run, self.axis.completed_steps)]
        self.all: list[Logger] = [*shown, MetricsFile(run.metrics_path, self.axis.completed_steps)]

    def _begin(self) -> None:
        """Log what the W&B run has once, and listen to it."""
        if self._experiment.disabled:
            return
        if self._options.code and len(self._run.events_of(Tracking)) == 1:
            with reported("the code artifact"):
                wandb_artifacts.log_code(self._experiment, self._run)
        if self._options.alerts:
            self._alerts = TroubleAlerts(self._experiment, self._run)
        if self._options.stop_tag and not self._experiment.offline:
            self._tags = TagWatch(
                self._experiment, self._options.stop_tag, lambda: self._run.request_stop("a tag of the W&B run")
            )

    def callbacks(self) -> list[Callback]:
        """Return the callbacks that log to W&B on this rank."""
        if self._experiment is None or self._options.watch is None:
            return []
        return [Histograms(self._experiment, self._options.watch, self._options.watch_every_n_steps)]

    def checkpoint_saved(self, checkpoint: Checkpoint, is_best: Callable[[], bool]) -> None:
        """Log a committed checkpoint as an artifact, if `tracking.artifacts` asks for it. Called in any thread.

        The bill is logged as well, at most every `_BILL_EVERY_S` seconds: an attempt that is killed logs no more.
        """
        if self._experiment is None or self._experiment.disabled:
            return
        if time.monotonic() >= self._next_bill:
            self._next_bill = time.monotonic() + _BILL_EVERY_S
            with reported("the bill"):
                self._experiment.summary.update(in_summary(self._run))
        if self._options.artifacts != "none":
            with reported("the checkpoint artifact"):
                wandb_artifacts.log_checkpoint(
                    self._experiment, self._run, checkpoint, is_best(), self._options.artifacts
                )

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add facts that are known only once everything is built, such as the number of parameters."""
        self._facts.update(facts)
        if self._experiment is not None:
            with reported("the config"):
                self._experiment.config.update({FACTS: self._facts}, allow_val_change=True)

    def finish(self, end: AttemptEnd) -> None:
        """Finalize all loggers; the W&B run last."""
        for logger in self.all:
            logger.finalize("success" if end == "finished" else "failed")
            if isinstance(logger, WandbCurves):
                logger.save()
        if self._tags is not None:
            self._tags.end()
        if self._alerts is not None:
            self._alerts.end()
        if self._experiment is not None:
            error = sys.exc_info()[1]
            if end == "failed" and self._options.alerts:
                with reported("the alert"):
                    text = mask(f"{type(error).__name__}: {error}" if error else "it ended with an error")
                    self._experiment.alert(title=f"{self._run.path.name} failed", text=text, level="ERROR")
            if end == "preempted":
                self._experiment.mark_preempting()  # with an exit code other than 0: W&B shows it as preempted
            finish(self._experiment, 0 if end in ("finished", "stopped") else 1, in_summary(self._run))
