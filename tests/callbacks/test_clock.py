"""A step is Lightning's `trainer.global_step`, whoever counts it: one small training of each kind that steps otherwise
than once a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.nn import functional

from tests.callbacks.boundary_job import RecordedSaves
from tests.train.two_loops import MICRO_BATCH, SAMPLES, Lines, Net, loader
from trainer.callbacks.boundary import Boundary, BoundaryOptions
from trainer.callbacks.clock import StepClock
from trainer.callbacks.metrics import BatchWork, TrainMetrics
from trainer.config.schema import CheckpointOptions, ResilienceOptions
from trainer.runs.directory import RunDirectory
from trainer.runtime.flight_recorder import Timeouts
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.runtime.stop import StopTraining
from trainer.train.loop import use_lean_loop
from trainer.train.save_points import set_save_point_handler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer"),
]
BATCHES = SAMPLES // MICRO_BATCH
EVERY = 3


class Manual(Net):
    """`steps(batch_idx)` optimizers' steps in each batch, of two optimizers in turn."""

    def __init__(self, steps: Callable[[int], int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        both: Any = self.optimizers()
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        for number in range(self.steps(batch_idx)):
            self.toggle_optimizer(both[number % 2])
            both[number % 2].step()
            self.untoggle_optimizer(both[number % 2])
        if self.steps(batch_idx):
            both[0].zero_grad()
            both[1].zero_grad()
        return {"loss": loss, "more": 1} if batch_idx % 2 else loss

    def configure_optimizers(self) -> Any:
        halves: Any = self.net
        return torch.optim.SGD(halves[0].parameters(), lr=0.1), torch.optim.SGD(halves[3].parameters(), lr=0.1)


class ReturnsNone(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class EndsEpochs(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


class StepsTwice(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        optimizer.step()


class StepsSometimes(Net):
    """Its hook is called for each batch; it steps on every second."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class TrainsNothing(Net):
    def configure_optimizers(self) -> None:
        return None


class ManualWithoutOptimizer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return []


class Watch(Callback):
    """What the heartbeat says once a batch is over, beside Lightning."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.heartbeat.batches:
            self.seen.append((self.heartbeat.step, trainer.global_step))


class Run:
    """One training of `module` under the clock."""

    def __init__(self, folder: Path, module: LightningModule, *callbacks: Callback, **options: Any) -> None:
        saver = RecordedSaves()
        self.saved = saver.steps
        self.folder, self.lines = folder, Lines()
        self.heartbeat = Heartbeat(RunDirectory(folder), Rank.from_environment())
        checkpoint = CheckpointOptions(every_n_steps=options.pop("every", EVERY))
        max_steps = options.get("max_steps")
        metrics = TrainMetrics(EVERY, BatchWork(MICRO_BATCH), max_steps, self.heartbeat, None)
        resilience = ResilienceOptions(agree_every_s=options.pop("agree_every_s", 1e-6))
        boundary = Boundary(saver, BoundaryOptions(checkpoint, resilience, folder / "stop", max_steps), None)
        clock = StepClock(metrics, boundary, self.heartbeat, Timeouts(ResilienceOptions()))
        self.watch = Watch(self.heartbeat)
        self.trainer = Trainer(
            accelerator="cpu",
            logger=self.lines,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, self.watch, clock, boundary],
            **{"max_epochs": 2, **options},
        )
        use_lean_loop(self.trainer)
        set_save_point_handler(self.trainer, boundary)
        self.module = module

    def fit(self) -> Run:
        torch.manual_seed(3)
        self.trainer.fit(self.module, loader())
        return self

    @property
    def logged(self) -> list[int | None]:
        return [step for step, line in self.lines.lines if "train/lr" in line or "train/loss" in line]


def due(steps: list[int], every: int = EVERY) -> list[int]:
    """Of the numbers of steps at the ends of batches the first at or past each multiple."""
    found = []
    for before, after in zip([0, *steps], steps, strict=False):
        if after // every > before // every:
            found.append(after)
    return found


def ends(per_batch: Callable[[int], int], epochs: int = 2) -> list[int]:
    """Steps at the end of each batch."""
    total, found = 0, []
    for _ in range(epochs):
        for batch in range(BATCHES):
            total += per_batch(batch)
            found.append(total)
    return found


two = lambda _: 2  # noqa: E731
every_third = lambda batch: int(batch % 3 == 2)  # noqa: E731
now_and_then = lambda batch: (1, 0, 4)[batch % 3]  # noqa: E731

KINDS: dict[str, tuple[Callable[[], LightningModule], dict[str, Any], list[int]]] = {
    "plain": (Net, {}, ends(lambda _: 1)),
    "accumulate": (Net, {"accumulate_grad_batches": 4}, ends(lambda batch: int(batch % 4 == 3 or batch == 9))),
    "none": (ReturnsNone, {}, ends(lambda _: 1)),
    "minus-one": (EndsEpochs, {}, [1, 2, 3, 4, 5, 6, 7, 8]),
    "steps-twice": (StepsTwice, {}, ends(lambda _: 1)),
    "steps-sometimes": (StepsSometimes, {}, ends(lambda _: 1)),
    "no-optimizer": (TrainsNothing, {}, ends(lambda _: 1)),
    "two-optimizers": (lambda: Manual(two), {}, ends(two)),
    "manual-accumulation": (lambda: Manual(every_third), {}, ends(every_third)),
    "manual-now-and-then": (lambda: Manual(now_and_then), {}, ends(now_and_then)),
}


@pytest.mark.parametrize("name", KINDS)
def test_one_meaning_of_step(tmp_path: Path, name: str) -> None:
    make, options, steps = KINDS[name]
    run = Run(tmp_path, make(), **options).fit()
    assert run.watch.seen
    assert all(beat == counted for beat, counted in run.watch.seen)
    assert run.heartbeat.step == run.trainer.global_step == steps[-1]
    expected = due(steps)
    assert run.logged == expected
    assert run.saved == (expected if expected[-1] == steps[-1] else [*expected, steps[-1]])


def test_the_boundary_is_called_only_when_it_asked_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once steps were skipped: it is counted in steps, and a number that lags behind would always be due."""
    called: list[int] = []
    on_step = Boundary.on_step

    def recorded(self: Boundary, trainer: Trainer, module: LightningModule, step: int, *rest: Any) -> None:
        called.append(step)
        on_step(self, trainer, module, step, *rest)

    monkeypatch.setattr(Boundary, "on_step", recorded)
    Run(tmp_path, Net(), max_epochs=120, every=None, agree_every_s=3600).fit()  # 1,200 steps
    assert called == [1, 2, 1002]  # the interval is at most 1,000


def test_the_scheduler_of_accumulation(tmp_path: Path) -> None:
    run = Run(tmp_path, Net(), GradientAccumulationScheduler({0: 2, 1: 5})).fit()
    assert run.heartbeat.step == run.trainer.global_step == BATCHES // 2 + BATCHES // 5
    assert run.saved == [3, 6, 7]


def test_accumulation_changes_in_mid_epoch(tmp_path: Path) -> None:
    class Changes(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
            trainer.accumulate_grad_batches = 1 if rest[-1] < 3 else 3

    run = Run(tmp_path, Net(), Changes()).fit()
    assert run.watch.seen
    assert all(beat == counted for beat, counted in run.watch.seen)
    assert run.heartbeat.step == run.trainer.global_step < 2 * BATCHES


def test_batches_are_steps_without_any_optimizer(tmp_path: Path) -> None:
    """Under manual optimization, where Lightning counts nothing."""
    run = Run(tmp_path, ManualWithoutOptimizer()).fit()
    assert run.trainer.global_step == 0
    assert run.heartbeat.step == 2 * BATCHES
    assert len(run.saved) == len(due(ends(lambda _: 1))) + 1


@pytest.mark.parametrize(("max_steps", "ends_at"), [(5, 6), (6, 6), (1, 2)])
def test_a_batch_jumps_over_the_last_step(tmp_path: Path, max_steps: int, ends_at: int) -> None:
    run = Run(tmp_path, Manual(two), max_steps=max_steps, max_epochs=-1, every=None).fit()
    assert run.trainer.global_step == run.heartbeat.step == ends_at
    assert run.saved == [ends_at]


class Asks(Callback):
    """For a stop, at the end of a batch."""

    def __init__(self, batch: int, folder: Path) -> None:
        self.batch, self.folder = batch, folder

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        if rest[-1] == self.batch:
            (self.folder / "stop").touch()


@pytest.mark.parametrize(("per_batch", "batch", "stops_at"), [(every_third, 3, 2), (two, 3, 8), (every_third, 0, 1)])
def test_a_stop_waits_for_a_batch_that_steps(
    tmp_path: Path, per_batch: Callable[[int], int], batch: int, stops_at: int
) -> None:
    """Between two, gradients of the module's own may be accumulated, and no checkpoint has them."""
    run = Run(tmp_path, Manual(per_batch), Asks(batch, tmp_path), every=None)
    with pytest.raises(StopTraining):
        run.fit()
    assert run.saved == [stops_at]


def test_a_stop_where_nothing_ever_steps_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.callbacks.boundary.MAX_DEFERRED_BATCHES", 4)
    run = Run(tmp_path, Manual(lambda _: 0), Asks(2, tmp_path), every=None)
    with pytest.raises(StopTraining):
        run.fit()
    assert len(run.watch.seen) == 2 + 4


def test_a_logged_loss_is_the_mean_of_all_micro_batches_of_its_step(tmp_path: Path) -> None:
    losses: list[float] = []

    class Notes(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    run = Run(tmp_path, Notes(), accumulate_grad_batches=2).fit()
    shown = {step: line["train/loss"] for step, line in run.lines.lines if "train/loss" in line}
    assert shown.keys() == {3, 6, 9}
    for step, loss in shown.items():
        assert loss == pytest.approx(sum(losses[2 * step - 2 : 2 * step]) / 2, rel=1e-6)


def test_a_tensor_that_manual_optimization_returns_need_not_be_a_number(tmp_path: Path) -> None:
    class Many(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return torch.tensor([1.0, 3.0])

    run = Run(tmp_path, Many(two)).fit()
    assert {line["train/loss"] for _, line in run.lines.lines if "train/loss" in line} == {2.0}
