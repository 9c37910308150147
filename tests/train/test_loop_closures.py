"""What users return from a training step and do with its closure: the lean loop does as Lightning's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.optimization.closure import AbstractClosure
from torch import Tensor

from tests.train.test_loop import MICRO_BATCHES, both
from tests.train.two_loops import At, Net, Trace, WithOptimizer, train
from trainer.train.loop_plan import evaluates_closure_first

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]


class ForgetsTheClosure(Net):
    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        pass


class DropsTheClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


def failure(lean: bool, module: LightningModule, **options: Any) -> tuple[type, str, int, list[Any]]:
    """How a training ends that must fail: the error, the steps counted, the calls of `on_train_batch_end`."""
    trace = Trace()
    stopped = At("on_exception", 0, lambda *_: None)
    steps: list[int] = []
    stopped.on_exception = lambda trainer, *_: steps.append(trainer.global_step)  # type: ignore[method-assign]
    with pytest.raises(Exception) as raised:
        train(lean, module, callbacks=[stopped, trace], trace=False, **options)
    return type(raised.value), str(raised.value), steps[0], [entry for entry in trace.seen if entry[0] == "end"]


@pytest.mark.parametrize("make", [ForgetsTheClosure, lambda: WithOptimizer(DropsTheClosure)])
def test_a_step_that_never_runs_its_closure_is_an_error(make: Callable[[], LightningModule]) -> None:
    stock, lean = failure(False, make()), failure(True, make())
    assert stock == lean
    assert "closure hasn't been executed" in lean[1]


class KeywordOnly(torch.optim.SGD):
    def step(self, *, closure: Any = None) -> Any:
        return super().step(closure)


class ScalerFirst(torch.optim.SGD):
    def step(self, grad_scaler: Any = None, closure: Any = None) -> Any:
        assert grad_scaler is None
        return super().step(closure)


@pytest.mark.parametrize("kind", [KeywordOnly, ScalerFirst])
def test_the_closure_is_given_by_keyword(kind: type[torch.optim.Optimizer]) -> None:
    assert both(lambda: WithOptimizer(kind)).steps[0] == 2 * MICRO_BATCHES


class HookedBefore(Net):
    """Its optimizer has a hook that torch calls before the step, and so before the closure."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.notes.append("forward")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(lambda *_: self.notes.append("hook"))
        return optimizer


def test_a_hook_before_the_step_is_called_before_the_closure() -> None:
    assert both(HookedBefore).module_notes[:4] == ["hook", "forward", "hook", "forward"]


TORCHS_OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]


def test_which_optimizers_evaluate_the_closure_first() -> None:
    """Of all others the loop does not evaluate it itself."""
    first = []
    for kind in TORCHS_OPTIMIZERS:
        calls: list[str] = []
        matrix = torch.ones(2, 2, requires_grad=True)
        optimizer = kind([matrix])  # type: ignore[call-arg]

        def closure(matrix: Tensor = matrix, calls: list[str] = calls, kind: type = kind) -> Tensor:
            assert torch.equal(matrix, torch.ones(2, 2))
            assert torch.is_grad_enabled()
            calls.append("closure")
            gradient = torch.ones(2, 2)
            matrix.grad = gradient.to_sparse() if kind is torch.optim.SparseAdam else gradient
            return matrix.sum()

        if evaluates_closure_first(optimizer):
            optimizer.step(closure)
            assert calls == ["closure"], kind
            first.append(kind)
    assert set(TORCHS_OPTIMIZERS) - set(first) == {torch.optim.LBFGS}

    class Own(torch.optim.SGD):
        pass

    weights = [torch.ones(2, requires_grad=True)]
    assert not evaluates_closure_first(Own(weights))
    replaced = torch.optim.SGD(weights)
    replaced.step = lambda closure=None: closure()  # type: ignore[assignment,method-assign,misc]
    assert not evaluates_closure_first(replaced)
    scheduled = torch.optim.SGD(weights)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)
    assert "step" in vars(scheduled)
    assert evaluates_closure_first(scheduled)


class LooksAtTheClosure(Net):
    """Evaluates it once more before the step, as sharpness-aware optimizers do by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        assert isinstance(optimizer_closure, AbstractClosure)
        self.notes.append((type(optimizer_closure).__name__, type(optimizer).__name__, optimizer_closure().item()))
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_closure_of_the_hook_is_lightnings(accumulate: int) -> None:
    assert both(LooksAtTheClosure, accumulate_grad_batches=accumulate).module_notes[0][0] == "Closure"


class Wrapped(Net):
    """Hands out Lightning's wrapper itself."""

    def configure_optimizers(self) -> Any:
        return LightningOptimizer(torch.optim.AdamW(self.parameters(), lr=0.01))


def test_an_optimizer_that_is_wrapped_already() -> None:
    record = both(Wrapped, gradient_clip_val=0.05)
    assert [entry[0] for entry in record.seen].count("optimizer") == 2 * MICRO_BATCHES


# What `training_step` returns.


class Returns(Net):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return self.value(loss) if batch_idx == 2 else loss


@pytest.mark.parametrize("value", [lambda _: -1, lambda loss: {"lost": loss}, lambda loss: [loss]])
def test_what_is_no_loss_is_the_same_error(value: Any) -> None:
    assert failure(False, Returns(value)) == failure(True, Returns(value))


@pytest.mark.parametrize(
    "value",
    [lambda loss: {"loss": loss, "more": loss.detach() + 1}, lambda loss: loss.reshape(1), lambda loss: loss * 2],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_is_a_loss_trains_alike(value: Any, accumulate: int) -> None:
    both(lambda: Returns(value), accumulate_grad_batches=accumulate)


def test_none_on_several_ranks_is_the_same_error() -> None:
    class TwoRanks(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            trainer.strategy.world_size = 2  # type: ignore[attr-defined]

    messages = []
    for lean in (False, True):
        with pytest.raises(RuntimeError) as raised:
            train(lean, Returns(lambda _: None), callbacks=[TwoRanks()])
        messages.append(str(raised.value))
    assert messages[1].startswith(messages[0].rstrip("."))
    assert "Return a loss of 0 instead" in messages[1]
