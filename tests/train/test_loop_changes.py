"""What users change under a training that runs, and what they get wrong: the lean loop does as Lightning's own.

Each scenario trains with both loops; `both` compares all that can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from tests.train.test_loop import MICRO_BATCHES, both
from tests.train.two_loops import At, Net, Trace, Validated, WithOptimizer, train
from trainer.config.batch import BatchPlan
from trainer.data.loader import resumable
from trainer.data.order import GlobalBatchSampler
from trainer.train.loop import use_lean_loop
from trainer.train.save_points import use_save_points

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]


def change(act: Callable[[Trainer, Any], None], hook: str = "on_train_batch_end", batch: int = 3) -> Any:
    return lambda: [At(hook, batch, act)]


def differs(record: Any, make: Callable[[], LightningModule] = Net, **options: Any) -> bool:
    """Whether the change had an effect: a training without it ends with other weights."""
    return bool(record.weights != train(True, make(), **options).weights)


# Changed in mid-epoch.

SCHEDULE = {"interval": "step"}


def replace_schedulers(trainer: Trainer, _: Any) -> None:
    one = LRSchedulerConfig(ExponentialLR(trainer.optimizers[0], 0.5), interval="step")
    trainer.strategy.lr_scheduler_configs = [one]


def add_scheduler(trainer: Trainer, _: Any) -> None:
    one = LRSchedulerConfig(ExponentialLR(trainer.optimizers[0], 0.5), interval="step", frequency=2)
    trainer.strategy.lr_scheduler_configs.append(one)


def change_interval(trainer: Trainer, _: Any) -> None:
    trainer.lr_scheduler_configs[0].interval = "epoch"


def change_frequency(trainer: Trainer, _: Any) -> None:
    trainer.lr_scheduler_configs[0].frequency = 2


def drop_schedulers(trainer: Trainer, _: Any) -> None:
    trainer.strategy.lr_scheduler_configs = []


@pytest.mark.parametrize(
    "act",
    [replace_schedulers, add_scheduler, change_interval, change_frequency, drop_schedulers],
    ids=lambda f: f.__name__,
)
def test_schedulers(act: Any) -> None:
    record = both(lambda: Net(SCHEDULE), make_callbacks=change(act))
    assert differs(record, lambda: Net(SCHEDULE))


def test_the_first_scheduler_comes_in_mid_epoch() -> None:
    assert differs(both(Net, make_callbacks=change(replace_schedulers)))


def test_a_plateau_that_comes_in_mid_epoch() -> None:
    def act(trainer: Trainer, _: Any) -> None:
        plateau = ReduceLROnPlateau(trainer.optimizers[0], factor=0.5, patience=0, threshold=10.0)
        one = LRSchedulerConfig(plateau, interval="step", reduce_on_plateau=True, monitor="val/loss", strict=False)
        trainer.strategy.lr_scheduler_configs.append(one)

    record = both(Validated, make_callbacks=change(act, batch=5), val_check_interval=2)
    assert record.learning_rate < 0.01


def clip(value: float | None, algorithm: str = "norm") -> Any:
    def act(trainer: Trainer, _: Any) -> None:
        trainer.gradient_clip_val, trainer.gradient_clip_algorithm = value, algorithm  # type: ignore[assignment]

    return act


@pytest.mark.parametrize("before", [None, 0.05])
@pytest.mark.parametrize("value", [None, 0.01])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_clipping(before: float | None, value: float | None, hook: str) -> None:
    record = both(Net, make_callbacks=change(clip(value), hook), gradient_clip_val=before)
    assert differs(record, gradient_clip_val=before) == (before != value)


def test_clipping_by_another_algorithm() -> None:
    record = both(Net, make_callbacks=change(clip(0.01, "value")), gradient_clip_val=0.01)
    assert differs(record, gradient_clip_val=0.01)


def test_clipping_by_a_plugin_of_the_users() -> None:
    """Its `clip_gradients` is called on each step, also where no value is set."""

    class Halves(Precision):
        def clip_gradients(self, optimizer: Any, *_: Any, **__: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5).clamp_(-0.01, 0.01)

    records = [train(lean, Net(), plugins=[Halves()]) for lean in (False, True)]
    assert records[0].weights == records[1].weights != train(True, Net()).weights


@pytest.mark.parametrize(("name", "value"), [("limit_val_batches", 0), ("check_val_every_n_epoch", 2)])
def test_validation(name: str, value: int) -> None:
    record = both(Validated, make_callbacks=change(lambda trainer, _: setattr(trainer, name, value)))
    assert record.lines != train(True, Validated()).lines


def test_validation_switched_on() -> None:
    act = change(lambda trainer, _: setattr(trainer, "check_val_every_n_epoch", 1))
    record = both(Validated, make_callbacks=act, check_val_every_n_epoch=3)
    assert "val/loss" in record.metrics[1]


def test_validation_interval() -> None:
    act = change(lambda trainer, _: setattr(trainer, "val_check_batch", 2))
    assert "val/loss" in both(Validated, make_callbacks=act).metrics[1]


def test_accumulation() -> None:
    act = change(lambda trainer, _: setattr(trainer, "accumulate_grad_batches", 3))
    assert both(Net, make_callbacks=act).steps[0] < 2 * MICRO_BATCHES
    act = change(lambda trainer, _: setattr(trainer, "accumulate_grad_batches", 1))
    assert both(Net, make_callbacks=act, accumulate_grad_batches=3).steps[0] > 2 * MICRO_BATCHES // 3


def test_max_steps() -> None:
    act = change(lambda trainer, _: setattr(trainer.fit_loop.epoch_loop, "max_steps", 6))
    assert both(Net, make_callbacks=act).steps[0] == 6


def test_backward_skipped_from_a_batch_on() -> None:
    """As weight averaging does for its last epoch; here for three batches."""

    def skip(value: bool) -> Any:
        return lambda trainer, _: setattr(trainer.fit_loop, "_skip_backward", value)

    hook = "on_train_batch_start"
    record = both(Net, make_callbacks=lambda: [At(hook, 3, skip(True)), At(hook, 6, skip(False))])
    assert sum(entry[0] == "backward" for entry in record.seen) == 2 * MICRO_BATCHES - 3


def test_the_optimizer_is_replaced() -> None:
    def act(trainer: Trainer, module: LightningModule) -> None:
        trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=0.5)]

    assert both(Net, make_callbacks=change(act)).learning_rate == 0.5


def test_an_optimizer_whose_gradients_are_zeroed_in_another_way_comes() -> None:
    class Keeps(torch.optim.SGD):
        """Leaves a part of each gradient to the next step."""

        def zero_grad(self, set_to_none: bool = True) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)

    def act(trainer: Trainer, module: LightningModule) -> None:
        trainer.strategy.optimizers = [Keeps(module.parameters(), lr=0.01)]

    both(Net, make_callbacks=change(act))
    both(lambda: WithOptimizer(Keeps))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_callback_comes_and_goes(hook: str) -> None:
    """For the very hook in which it does, the loops differ (docs of `train/loop.py`)."""
    later = Trace()

    def act(trainer: Trainer, _: Any) -> None:
        trainer.callbacks.append(later)  # type: ignore[attr-defined]

    def leave(trainer: Trainer, _: Any) -> None:
        trainer.callbacks.remove(later)  # type: ignore[attr-defined]

    seen = []
    for lean in (False, True):
        later.seen = []
        callbacks = [At(hook, 3, act), At(hook, 7, leave), Trace()]
        train(lean, Net(), callbacks=callbacks, trace=False)
        seen.append([entry for entry in later.seen if entry[0] != hook[15:] or entry[-1] not in (3, 7)])
    assert seen[0] == seen[1]
    assert len(seen[0]) > 20


def test_a_hook_is_set_on_the_module() -> None:
    def act(_: Trainer, module: LightningModule) -> None:
        def halve() -> None:
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(0.5).clamp_(-0.01, 0.01)

        module.on_after_backward = halve  # type: ignore[method-assign]

    assert differs(both(Net, make_callbacks=change(act)))


def test_the_training_step_is_replaced_on_the_module() -> None:
    def act(_: Trainer, module: LightningModule) -> None:
        before = module.training_step
        module.training_step = lambda batch, batch_idx: before(batch, batch_idx) * 3  # type: ignore[method-assign]

    assert differs(both(Net, make_callbacks=change(act)))


# Patched for everybody.

PATCHED: list[tuple[Any, str]] = [
    (Strategy, "backward"),
    (Strategy, "training_step"),
    (Strategy, "optimizer_step"),
    (Strategy, "batch_to_device"),
    (Strategy, "on_train_batch_start"),
    (Strategy, "pre_backward"),
    (Precision, "pre_backward"),
    (Precision, "backward"),
    (Precision, "optimizer_step"),
    (Precision, "clip_gradients"),
    (Precision, "convert_input"),
    (Callback, "on_train_batch_end"),
    (Callback, "on_before_zero_grad"),
    (LightningModule, "on_after_backward"),
    (LightningModule, "on_train_batch_start"),
    (LightningModule, "backward"),
    (LightningModule, "optimizer_step"),
    (LightningModule, "optimizer_zero_grad"),
    (LightningModule, "configure_gradient_clipping"),
    (LightningModule, "lr_scheduler_step"),
    (LightningModule, "transfer_batch_to_device"),
    (LightningModule, "_on_before_batch_transfer"),
    (LightningOptimizer, "step"),
    (torch.optim.Optimizer, "zero_grad"),
    (torch.optim.AdamW, "zero_grad"),
    (torch.optim.AdamW, "step"),
    (_TrainingEpochLoop, "advance"),
    (_TrainingEpochLoop, "_should_accumulate"),
    (call, "_call_callback_hooks"),
    (call, "_call_strategy_hook"),
]


def test_what_is_patched_is_called() -> None:
    """As often as by Lightning's loop, and with the same result."""
    for owner, name in PATCHED:
        real, calls = getattr(owner, name), []

        def spy(*arguments: Any, real: Any = real, calls: list[int] = calls, **named: Any) -> Any:
            calls.append(1)
            return real(*arguments, **named)

        counts, weights = [], []
        with mock.patch.object(owner, name, spy):
            for lean in (False, True):
                calls.clear()
                options: Any = {"trace": False, "max_epochs": 1, "limit_train_batches": 3, "callbacks": [Callback()]}
                record = train(lean, Net(SCHEDULE), expect_lean=None, **options)
                counts.append(len(calls))
                weights.append(record.weights)
        assert counts[0] == counts[1] > 0, (owner.__name__, name, counts)
        assert weights[0] == weights[1], (owner.__name__, name)


def test_what_is_patched_on_an_instance_is_called() -> None:
    counts: dict[bool, list[int]] = {}
    for lean in (False, True):
        module, calls = Net(), []

        class Patches(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: LightningModule, calls: Any = calls) -> None:
                for owner, name in (
                    (trainer.optimizers[0], "zero_grad"),
                    (trainer.optimizers[0], "step"),
                    (trainer.strategy, "backward"),
                    (trainer.precision_plugin, "pre_backward"),
                    (pl_module, "backward"),
                    (trainer.strategy._lightning_optimizers[0], "step"),
                ):
                    real = getattr(owner, name)
                    spy = lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1]  # noqa: E731
                    setattr(owner, name, spy)

        train(lean, module, callbacks=[Patches()], trace=False)
        counts[lean] = sorted(calls)
    assert counts[False] == counts[True]
    assert len(counts[True]) == 6 * 2 * MICRO_BATCHES


# What can be seen of it elsewhere.


class Crashes(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if batch_idx == 3:
            raise ValueError("crash")
        return super().training_step(batch, batch_idx)


def test_gradients_are_there_in_on_exception() -> None:
    class Dump(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            self.norms = [None if one.grad is None else one.grad.norm().item() for one in pl_module.parameters()]

    dumps = [Dump(), Dump()]
    for lean, dump in zip((False, True), dumps, strict=True):
        with pytest.raises(ValueError, match="crash"):
            train(lean, Crashes(), callbacks=[dump], trace=False)
    assert dumps[0].norms == dumps[1].norms
    assert None not in dumps[1].norms


def test_rows_of_a_profiler_have_lightnings_names() -> None:
    names = []
    for lean in (False, True):
        profiler = SimpleProfiler(filename=None)
        profiler.describe = lambda: None  # type: ignore[method-assign]
        train(lean, Net(), expect_lean=False, profiler=profiler, max_epochs=1)
        names.append({name for name in profiler.recorded_durations if "Callback" not in name})
    assert names[0] == names[1]
    assert "[_TrainingEpochLoop].train_dataloader_next" in names[1]


class EndsEpochs(LightningModule):
    """-1 from `on_train_batch_start`: the rest of the epoch is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.read: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.read.setdefault(self.current_epoch, []).append(batch.flatten().int().tolist())
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("lean", [False, True])
def test_an_epoch_that_was_ended_early_is_not_continued_by_the_next(lean: bool) -> None:
    module = EndsEpochs()
    samples = torch.arange(32.0).reshape(-1, 1)
    batches = resumable(DataLoader(samples, 4, shuffle=True), BatchPlan.of(4, None, 1), rank=0, seed=5)  # type: ignore[arg-type]
    fits = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (use_lean_loop if lean else use_save_points)(fits)
    fits.fit(module, batches)
    order = GlobalBatchSampler(32, BatchPlan.of(4, None, 1), 0, 5)
    for epoch in range(3):
        order.seek(epoch, 0)
        assert module.read[epoch] == list(order)[:2]
    assert fits.global_step == 6
