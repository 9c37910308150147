"""The loggers of a run, the same list on every rank: `trainer.logger` is the first that a user would look for.

The user's own (section `logger`), then W&B, else `NoLogger`; `metrics.jsonl` is always the last. Only the first rank
writes: Lightning's loggers, and these, do nothing on the others and hand out an experiment that takes any call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from trainer.config.schema import Config
from trainer.runs.directory import RunDirectory
from trainer.runtime.process import Rank
from trainer.runtime.steps import steps_taken
from trainer.tracking import user_loggers
from trainer.tracking.metrics_file import MetricsFile
from trainer.tracking.weights_and_biases import finish, identity, masked, start


class StepAxis:
    """The x axis of every logger: optimizer steps completed, for training and validation alike.

    Lightning counts them differently (the 50th step's metrics are logged at 49, the validation after it at 50). A step
    that the user gives, by `self.log("step", ...)` or as an argument, stays.
    """

    def __init__(self, counted: Callable[[], int]) -> None:
        self._counted = counted
        self.trainer: Trainer | None = None
        """Once it is built."""

    def completed_steps(self) -> int:
        """What the heartbeat has, or already Lightning's own count: its callbacks come before ours at a step's end."""
        if self.trainer is None or self.trainer.lightning_module is None:
            return self._counted()
        return max(self._counted(), steps_taken(self.trainer))

    def step(self, given: int | None) -> int:
        if given is None or self.trainer is None or given == self.trainer.fit_loop.epoch_loop._batches_that_stepped:
            return self.completed_steps()
        return given


class WandbCurves(WandbLogger):
    """The run's W&B run as Lightning's WandbLogger; `experiment` is None on all ranks but the first."""

    def __init__(self, experiment: Any, axis: StepAxis, run: RunDirectory, names: Mapping[str, Any]) -> None:
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
        super().log_metrics(metrics, step=self._axis.step(step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        super().log_hyperparams(masked(dict(params) if isinstance(params, Mapping) else vars(params)))


class NoLogger(DummyLogger):
    """`self.logger` where nothing is tracked: takes every call and does nothing, on every rank.

    Its name and version are those of Lightning's own default, which say where ModelCheckpoint puts its files.
    """

    def __init__(self, run: RunDirectory) -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        return "lightning_logs"

    @property
    def version(self) -> int:  # type: ignore[override]
        return 0

    @property
    def save_dir(self) -> str:
        return str(self._run.path)


class Loggers:
    """Those of one attempt; `all` is what Lightning's Trainer is given."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        rank: Rank,
        counted: Callable[[], int],
        unsure: list[Any],
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Collective.

        `counted`: optimizer steps by the heartbeat. `unsure`: lines of metrics.jsonl that may not have got to W&B.
        `group`: the CPU group.
        """
        self.axis = StepAxis(counted)
        self._experiment: Any = None
        own = user_loggers.build(config.logger, run, counted(), rank.is_first, group)
        shown = [user_loggers.at_steps(logger, self.axis.step) for logger in own]
        if config.tracking.name == "wandb":
            names = identity(run, config.tracking)
            if rank.is_first:
                self._experiment = start(run, config.tracking, run.config(), unsure)
                names = {**names, "project": self._experiment.project, "id": self._experiment.id}
            shown.append(WandbCurves(self._experiment, self.axis, run, names))
        self.all: list[Logger] = [*(shown or [NoLogger(run)]), MetricsFile(run.metrics_path, self.axis.completed_steps)]

    def finish(self, exit_code: int) -> None:
        """End each; the W&B run last."""
        for logger in self.all:
            logger.finalize("success" if exit_code == 0 else "failed")
        if self._experiment is not None:
            finish(self._experiment, exit_code)
