"""A training of nothing but boundaries, by a clock that stands; as a script one of two ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed

from trainer.callbacks import boundary
from trainer.callbacks.boundary import Boundary, BoundaryOptions, Saver
from trainer.config.schema import CheckpointOptions, ResilienceOptions
from trainer.runtime.stop import StopTraining


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class RecordedSaves(Saver):
    """Keeps the steps that would have been saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.failed = False

    def save(self, trainer: Any) -> None:
        self.steps.append(trainer.global_step)

    def save_locally(self, trainer: Any) -> None:
        raise AssertionError("there is no local folder")

    def save_final(self, trainer: Any) -> None:
        raise AssertionError("nothing changes the weights at the end")

    def has_failed(self) -> bool:
        return self.failed


class Job:
    """A training without a training: `step()` is an optimizer step that took `step_s`."""

    def __init__(self, folder: Path, clock: Clock, group: Any, step_s: float, **options: Any) -> None:
        self.saver = RecordedSaves()
        self.saved = self.saver.steps
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            should_stop=False,
            ckpt_path=None,
            lightning_module=SimpleNamespace(automatic_optimization=True),
        )
        self.clock, self.step_s = clock, step_s
        self.stop_request = folder / "stop"
        checkpoint = CheckpointOptions(**{"every_n_steps": None, **options})
        limits = BoundaryOptions(checkpoint, ResilienceOptions(agree_every_s=1.0), self.stop_request)
        self.boundary = Boundary(self.saver, limits, group)
        self.boundary.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.clock.now += self.step_s
            self.trainer.global_step += 1
            if self.trainer.global_step >= self.boundary.next_step:
                self.boundary.on_step(self.trainer, None, self.trainer.global_step)  # type: ignore[arg-type]
            if self.boundary.due:
                self.boundary.on_save_point(self.trainer, is_last=False)


def main() -> None:
    """Writes the steps at which this rank saved, and the one at which it stopped. The second rank's clock is ahead."""
    rank, folder, skew_s = int(os.environ["RANK"]), Path(sys.argv[1]), float(sys.argv[2])
    clock = Clock()
    clock.now = rank * skew_s
    boundary.time = clock  # type: ignore[assignment]
    boundary.validation_follows = lambda trainer: trainer.global_step % 50 == 0
    torch.distributed.init_process_group("gloo")
    (folder / str(rank)).mkdir()
    step_s = 0.02 + rank * skew_s / 100
    job = Job(folder / str(rank), clock, torch.distributed.group.WORLD, step_s, every_minutes=0.1, every_n_steps=50)
    stopped = None
    try:
        for step in range(1, 1500):
            if step == 1234 and rank == 0:
                job.stop_request.touch()
            job.steps(1)
    except StopTraining:
        stopped = job.trainer.global_step
    (folder / f"seen-{rank}.json").write_text(json.dumps([job.saved, stopped]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
