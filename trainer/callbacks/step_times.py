"""Measures the steps of a short job, for `trainer time`."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.core.files import write_atomic
from trainer.core.records import dumps
from trainer.runs.directory import RunDirectory
from trainer.runs.records import StepTiming
from trainer.runtime.process import Rank
from trainer.runtime.steps import steps_of
from trainer.tracking.metrics_file import run_folder


class StepTimes(Callback):
    """Writes `timing/rank-R.json` after the steps that are measured.

    On a GPU it waits for the device before the first and after the last of them, not between them.

    Args:
        warmup: Steps before the measured ones: they compile, allocate and fill the caches.
        steps: Steps to measure.
    """

    read_only = True
    """Hooks change nothing in place, so the loop need not copy the loss for them (`train/loop_plan.py`)."""

    def __init__(self, warmup: int, steps: int) -> None:
        self._warmup, self._steps = warmup, steps
        self._walls: list[float] = []
        self._cpus: list[float] = []
        self._first: int | None = None
        self._seen = 0
        self._is_over = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let ReduceLROnPlateau wait for its metric, which only a validation logs."""
        for config in trainer.lr_scheduler_configs:
            config.strict = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time at the end of each step, and write the record after the last one."""
        step = steps_of(trainer).completed
        if self._is_over or step == self._seen:
            return
        self._seen = step
        if step < self._warmup:
            return
        if self._first is None:
            _wait(trainer)
            self._first = step
            self._note()
            return
        done = step - self._first
        if done >= self._steps:
            _wait(trainer)
        self._note()
        if done >= self._steps:
            self._is_over = True
            self._write(trainer, done)

    def _note(self) -> None:
        self._walls.append(time.perf_counter())
        self._cpus.append(time.thread_time())

    def _write(self, trainer: Trainer, done: int) -> None:
        batches, epochs = trainer.num_training_batches, None
        if batches != float("inf"):
            epochs = max(1, -(-int(batches) // trainer.accumulate_grad_batches))
        timing = StepTiming(
            steps=done,
            wall_s=self._walls[-1] - self._walls[0],
            cpu_s=self._cpus[-1] - self._cpus[0],
            each_s=_differences(self._walls),
            each_cpu_s=_differences(self._cpus),
            threads=torch.get_num_threads(),
            steps_per_epoch=epochs,
            device=torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else None,
        )
        path = RunDirectory(run_folder(trainer)).timing_path(Rank.from_environment().rank)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, dumps(timing, indent=1) + "\n")


def _differences(edges: list[float]) -> list[float]:
    return [round(after - before, 7) for before, after in itertools.pairwise(edges)]


def _wait(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
