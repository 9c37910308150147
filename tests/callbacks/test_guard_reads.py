"""The guard on a GPU, without one: it neither waits for the device nor reads gradients that clipping has just read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from tests.train.two_loops import Net, train
from trainer.callbacks import guard as guard_module
from trainer.callbacks.guard import LAG_STEPS, BadStep, Guard
from trainer.config.schema import ResilienceOptions
from trainer.runtime.clipping import clip_by_norm, report_clipping

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]
STEPS = 12


class Device:
    """Stands in for the clock of a GPU: an event has arrived once `behind` later ones have been recorded."""

    def __init__(self, behind: int) -> None:
        self.behind, self.recorded, self.waits = behind, 0, 0

    def event(self) -> Any:
        device = self

        class Event:
            number = 0

            def record(self) -> None:
                device.recorded += 1
                self.number = device.recorded

            def query(self) -> bool:
                return device.recorded - self.number >= device.behind

            def synchronize(self) -> None:
                device.waits += 1

        return Event()


class Watched(Guard):
    """Records when each step is checked, and how often all gradients are read."""

    def __init__(self, **options: Any) -> None:
        directory: Any = SimpleNamespace(events_of=lambda kind: [], add_event=lambda event: None)
        super().__init__(ResilienceOptions(**options), directory, 0, None)
        self.checked: list[tuple[int, int]] = []

    def _check_step(self, pending: Any, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.checked.append((trainer.global_step + 1, pending.step))
        super()._check_step(pending, trainer, module, optimizer)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A GPU that is two steps behind the host."""
    made = Device(behind=2)
    monkeypatch.setattr(guard_module, "_is_on_device", lambda value: True)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of gradients that the guard has read."""
    counted: list[int] = []
    for name in ("sum_of_norms", "non_finite_flag"):
        original = getattr(guard_module, name)

        def counting(gradients: list[torch.Tensor], original: Any = original) -> torch.Tensor:
            counted.append(len(gradients))
            return original(gradients)

        monkeypatch.setattr(guard_module, name, counting)
    return counted


def run(guard: Guard, clip: float | None = None, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> Any:
    """Train `STEPS` steps; the guard checks as on a GPU, which does not choose the fast check of the CPU."""
    original = guard.on_train_start

    def on_train_start(trainer: Trainer, module: Any) -> None:
        if clip is not None:
            report_clipping(trainer.precision_plugin)  # as our strategies do
        original(trainer, module)
        guard._checks_fast = False

    guard.on_train_start = on_train_start  # type: ignore[method-assign]
    return train(True, Net(), [guard], trace=False, max_steps=STEPS, max_epochs=-1, gradient_clip_val=clip, **options)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_is_read_late_and_without_a_wait(device: Device, reads: list[int], clip: float | None) -> None:
    guard = Watched()
    run(guard, clip)
    assert guard.checked == [(step + LAG_STEPS, step) for step in range(1, STEPS - LAG_STEPS + 1)]
    assert device.waits == 0
    assert len(reads) == (STEPS if clip is None else 0), "clipping has read them already"
    assert len(guard._pending) == LAG_STEPS
    guard.flush(SimpleNamespace(lightning_module=None, global_step=STEPS))  # type: ignore[arg-type]
    assert [step for _, step in guard.checked] == list(range(1, STEPS + 1))
    assert device.waits == 2, "a save waits for what has not arrived"


class Bad(Net):
    """Its loss is not a number from step 3 on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 2 else loss


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_norm_of_the_clipping_is_acted_on(device: Device, reads: list[int], policy: str) -> None:
    guard = Watched(on_nonfinite=policy)
    original = guard.on_train_start

    def on_train_start(trainer: Trainer, module: Any) -> None:
        report_clipping(trainer.precision_plugin)
        original(trainer, module)
        guard._checks_fast = False

    guard.on_train_start = on_train_start  # type: ignore[method-assign]
    options: Any = {"trace": False, "max_steps": STEPS, "max_epochs": -1, "gradient_clip_val": 0.5}
    module = Bad()
    if policy == "stop":
        with pytest.raises(BadStep, match="step 3: "):
            train(True, module, [guard], **options)
        assert guard.checked[-1] == (3 + LAG_STEPS, 3)
    else:
        train(True, module, [guard], **options)
        assert guard.checked == [(step, step) for step in range(1, STEPS + 1)]
        assert all(bool(torch.isfinite(one).all()) for one in module.parameters())
    assert reads == []


def test_on_the_cpu_the_parameter_is_named_before_clipping_spreads_the_nan() -> None:
    """`clip_grad_norm_` would make every gradient NaN before the guard looks for the first one that is."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert layers[1].bias.grad is not None
    layers[1].bias.grad[0] = float("nan")
    named: list[str | None] = []
    clip_by_norm(layers.parameters(), 1.0, lambda norm: named.append(guard_module.first_non_finite(layers)))
    assert named == ["1.bias"]


def test_reported_clipping_gives_the_bits_of_torch() -> None:
    def gradients(clip: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        layers = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
        layers(torch.randn(8, 30)).square().sum().backward()
        clip(layers.parameters())
        return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]

    norms: list[torch.Tensor] = []
    ours = gradients(lambda parameters: clip_by_norm(parameters, 0.3, norms.append))
    theirs = gradients(lambda parameters: norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.3)))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert norms[0] == norms[1]
