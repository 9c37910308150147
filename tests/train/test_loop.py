"""The lean loop leaves behind exactly what Lightning's own does: weights, logged lines, metrics, counters, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.nn import functional

from tests.train.two_loops import MICRO_BATCH, SAMPLES, Net, Validated, assert_same, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]
MICRO_BATCHES = SAMPLES // MICRO_BATCH


def both(make: Callable[[], LightningModule], **options: Any) -> Any:
    """Train with both loops; the record of the lean one, once it is equal."""
    callbacks = options.pop("make_callbacks", list)
    ordinary = train(False, make(), callbacks=callbacks(), **options)
    lean = train(True, make(), callbacks=callbacks(), **options)
    assert_same(ordinary, lean)
    return lean


def test_plain() -> None:
    record = both(Net)
    assert record.steps == (2 * MICRO_BATCHES, 2)
    assert [entry[0] for entry in record.seen[:6]] == ["start", "zero", "backward", "after", "optimizer", "end"]


def test_without_any_hook() -> None:
    assert both(Net, trace=False).seen == []


def test_accumulation_with_a_partial_window_at_the_end() -> None:
    record = both(Net, accumulate_grad_batches=3)
    assert record.steps[0] == 2 * -(-MICRO_BATCHES // 3)


def test_accumulation_that_changes_between_epochs() -> None:
    record = both(Net, make_callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 5})])
    assert record.steps[0] == MICRO_BATCHES // 2 + MICRO_BATCHES // 5


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm: str) -> None:
    clipped = both(Net, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    assert clipped.weights != train(True, Net()).weights


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    assert both(Net, precision=precision, **options).weights != train(True, Net(), **options).weights


def test_gradient_scaler() -> None:
    """16-mixed scales the loss and may skip steps: the plugin's own methods must be used."""
    from lightning.pytorch.plugins import MixedPrecision

    def options() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 0.5}

    ordinary, lean = train(False, Net(), **options()), train(True, Net(), **options())
    assert_same(ordinary, lean)


@pytest.mark.parametrize(
    "schedule",
    [{"interval": "step"}, {"interval": "step", "frequency": 3}, {"interval": "epoch"}],
    ids=["step", "every-3", "epoch"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedules(schedule: dict[str, Any], accumulate: int) -> None:
    record = both(lambda: Net(schedule), accumulate_grad_batches=accumulate, max_epochs=4)
    assert record.learning_rate != 0.01


class Logs(Validated):
    """Logs in each way, a metric of its own among them, and from other hooks than the step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("train/step_only", loss * 2, on_step=True, on_epoch=False)
        self.log("train/max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        if batch_idx % 3 == 0:
            self.log_dict({"train/sometimes": loss * 3}, batch_size=len(batch[0]))
        return {"loss": loss, "extra": loss.detach() * 5}

    def on_after_backward(self) -> None:
        gradient = next(self.parameters()).grad
        assert gradient is not None
        self.log("grad", gradient.norm())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train/extra", outputs["extra"])

    def on_train_epoch_end(self) -> None:
        self.log("epoch_end", float(self.current_epoch))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_log(accumulate: int) -> None:
    record = both(Logs, accumulate_grad_batches=accumulate)
    assert any("train/loss_step" in line for _, line in record.lines)
    assert {"train/loss_epoch", "val/loss", "grad", "epoch_end"} <= set(record.metrics[1])
    assert "train/loss_epoch" in record.metrics[2]


class Hooked(Net):
    """Overrides all that a module may override around a step."""

    def __init__(self) -> None:
        super().__init__({"interval": "step"})
        self.notes: list[Any] = []

    def note(self, *values: Any) -> None:
        self.notes.append((self._current_fx_name, self.trainer.global_step, *values))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.note("before transfer", dataloader_idx)
        return [batch[0] * 2, batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.note("transfer", str(device))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.note(batch[0].sum().item(), batch_idx)
        return -1 if batch_idx == 7 else None

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.note(epoch, batch_idx)
        optimizer.zero_grad(set_to_none=False)

    def on_before_backward(self, loss: Tensor) -> None:
        self.note(loss.item())
        with torch.no_grad():
            loss.mul_(1.0)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.note()
        (loss * 0.5).backward()

    def on_after_backward(self) -> None:
        self.note()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note()

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.note(gradient_clip_val)
        self.clip_gradients(optimizer, 0.1, "norm")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.note(metric)
        scheduler.step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(outputs["loss"].item(), batch_idx)


class StepsItself(Hooked):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.note(epoch, batch_idx)
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("make", [Hooked, StepsItself])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_of_the_module(make: type[Hooked], accumulate: int) -> None:
    record = both(make, accumulate_grad_batches=accumulate)
    assert {note[0] for note in record.module_notes} >= {
        "on_before_zero_grad",
        "on_after_backward",
        "lr_scheduler_step",
    }
    assert max(entry[-1] for entry in record.seen if entry[0] == "end") == 6  # -1 ended the epoch


class Skips(Net):
    """Only the batch as an argument, and no loss now and then."""

    def training_step(self, batch: list[Tensor]) -> Any:  # type: ignore[override]
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        return None if batch[0].sum() > 4 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss() -> None:
    record = both(Skips)
    ended = [entry[-2] for entry in record.seen if entry[0] == "end"]
    assert {} in ended
    assert any(ended)


class Lbfgs(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_that_evaluates_the_closure_again() -> None:
    record = both(Lbfgs, trace=False)
    assert record.steps[0] == 2 * MICRO_BATCHES


@pytest.mark.parametrize("interval", [3, 0.5, 1.0])
def test_validation_in_mid_epoch(interval: float) -> None:
    record = both(Validated, val_check_interval=interval)
    assert "val/loss" in record.metrics[1]


def test_validation_counted_over_epochs() -> None:
    both(Validated, val_check_interval=7, check_val_every_n_epoch=None)


def test_max_steps_in_mid_epoch() -> None:
    assert both(Validated, max_epochs=-1, max_steps=MICRO_BATCHES + 3).steps[0] == MICRO_BATCHES + 3


class StopsAt(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.should_stop = True


def test_should_stop() -> None:
    assert both(Validated, make_callbacks=lambda: [StopsAt()]).steps[0] == 6


def test_early_stopping_waits_for_min_steps() -> None:
    def callbacks() -> list[Callback]:
        return [EarlyStopping("val/loss", patience=0, min_delta=10.0)]

    record = both(Validated, make_callbacks=callbacks, max_epochs=20, min_steps=2 * MICRO_BATCHES + 1)
    assert record.steps[0] < 20 * MICRO_BATCHES


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_in_mid_epoch_from_a_checkpoint_of_the_other_loop(tmp_path: Any, accumulate: int) -> None:
    """Either loop reads the other's checkpoints, and trains on as if nothing had happened."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / f"{type(trainer.fit_loop.epoch_loop).__name__}.ckpt")

    options = {"accumulate_grad_batches": accumulate, "max_steps": 5, "max_epochs": -1}
    both(Logs, make_callbacks=lambda: [Saves()], **options)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    resumed = [train(lean, Logs(), checkpoint=str(path), **options) for path in paths for lean in (False, True)]
    assert_same(resumed[0], resumed[1])
    assert_same(resumed[2], resumed[3])
    assert_same(resumed[0], resumed[3])


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def test_falls_back_where_it_cannot_train(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="trainer.train.loop"):
        both(Manual, expect_lean=False)
    assert "the module optimizes manually" in caplog.text


def test_falls_back_under_a_profiler() -> None:
    both(Net, expect_lean=False, profiler=SimpleProfiler(filename=None), max_epochs=1)


class LooksAtGradients(Net):
    """Notes whether the gradients of the step before are still there, and leaves some of its own."""

    def __init__(self, goes_backward: bool) -> None:
        super().__init__()
        self.goes_backward = goes_backward
        self.had_gradients: list[bool] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.had_gradients.append(any(parameter.grad is not None for parameter in self.parameters()))
        if self.goes_backward:
            self.net(batch[0]).square().mean().backward()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("goes_backward", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_do_not_live_through_the_next_forward(accumulate: int, goes_backward: bool) -> None:
    """Trains to the same weights, also where the step itself went backward; needs no memory for both at once."""
    module = LooksAtGradients(goes_backward)
    ordinary = train(False, LooksAtGradients(goes_backward), trace=False, accumulate_grad_batches=accumulate)
    lean = train(True, module, trace=False, accumulate_grad_batches=accumulate)
    assert_same(ordinary, lean)
    starts = [index % MICRO_BATCHES % accumulate == 0 for index in range(2 * MICRO_BATCHES)]
    assert module.had_gradients == [not starts_a_step for starts_a_step in starts]
