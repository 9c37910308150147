"""Train the same thing with Lightning's loop and with the lean one, and write down all that can be seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from trainer.train.loop import LeanTrainingEpochLoop, use_lean_loop

SAMPLES = 80
MICRO_BATCH = 8


class Net(LightningModule):
    """A small network whose dropout draws random numbers, so that a step too many or too few shows in the weights."""

    def __init__(self, schedule: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3))
        self.schedule = schedule

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **self.schedule}}


class WithOptimizer(Net):
    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=0.1)  # type: ignore[call-arg]


class At(Callback):
    """Does something once, in a hook of a batch of the first epoch."""

    def __init__(self, hook: str, batch: int, act: Callable[[Trainer, Any], None]) -> None:
        setattr(self, hook, lambda trainer, module, *rest: self._act(trainer, module, rest))
        self.batch, self.act = batch, act

    def _act(self, trainer: Trainer, module: LightningModule, rest: Any) -> None:
        if trainer.current_epoch == 0 and rest[-1] == self.batch:
            self.act(trainer, module)


class Validated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", functional.cross_entropy(self.net(batch[0]), batch[1]))


class Lines(Logger):
    """Keeps what a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    name = "lines"
    version = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Trace(Callback):
    """Keeps the state that hooks of a step see, in the order of the calls."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def _see(self, hook: str, trainer: Trainer, module: LightningModule, *values: Any) -> None:
        gradient = next(module.parameters()).grad
        self.seen.append(
            (
                hook,
                module._current_fx_name,
                trainer.global_step,
                trainer.current_epoch,
                trainer.fit_loop.epoch_loop.batch_progress.state_dict(),
                None if gradient is None else gradient.abs().sum().item(),
                *values,
            )
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._see("start", trainer, pl_module, batch[0].sum().item(), batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._see("zero", trainer, pl_module, type(optimizer).__name__)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._see("backward", trainer, pl_module, loss.item())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._see("after", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._see("optimizer", trainer, pl_module, type(optimizer).__name__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = {name: value.item() for name, value in outputs.items()} if outputs else outputs
        self._see("end", trainer, pl_module, shown, batch_idx)


@dataclass
class Record:
    """What a training leaves behind, as plain values that compare by `==`."""

    lean: bool
    weights: list[list[float]] = field(default_factory=list)
    lines: list[Any] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    loops: dict[str, Any] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    steps: tuple[int, int] = (0, 0)
    learning_rate: float = 0.0
    module_notes: list[Any] = field(default_factory=list)


def loader(samples: int = SAMPLES) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 6, generator=generator)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), MICRO_BATCH)


def train(
    lean: bool,
    module: LightningModule,
    callbacks: list[Callback] | None = None,
    checkpoint: str | None = None,
    expect_lean: bool | None = True,
    trace: bool = True,
    **options: Any,
) -> Record:
    """Fit `module` from a seed; `expect_lean` says whether the lean loop must have trained; None: no matter."""
    torch.manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    lines, seen = Lines(), Trace()
    options = {"max_epochs": 2, "limit_val_batches": 3, "log_every_n_steps": 3, "num_sanity_val_steps": 0, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=lines,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*(callbacks or []), *([seen] if trace else [])],
        **options,
    )
    if lean:
        use_lean_loop(trainer)
    watch = _Watch()
    if lean and expect_lean is not None:
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    validates = type(module).validation_step is not LightningModule.validation_step
    trainer.fit(module, loader(), loader(24) if validates else None, ckpt_path=checkpoint)
    if lean and expect_lean is not None:
        assert watch.was_lean is expect_lean, trainer.fit_loop.epoch_loop.reason  # type: ignore[attr-defined]
    connector = trainer._logger_connector
    return Record(
        lean=lean,
        weights=[parameter.flatten().tolist() for parameter in module.parameters()],
        lines=lines.lines,
        metrics=[_plain(connector._logged_metrics), _plain(trainer.callback_metrics), connector._progress_bar_metrics],
        loops=trainer.fit_loop.state_dict(),
        seen=seen.seen,
        steps=(trainer.global_step, trainer.current_epoch),
        learning_rate=trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0,
        module_notes=getattr(module, "notes", []),
    )


class _Watch(Callback):
    """Whether the lean loop was in use; itself it overrides no hook of a step."""

    was_lean: bool | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        assert isinstance(loop, LeanTrainingEpochLoop)
        self.was_lean = loop.reason is None


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def assert_same(ordinary: Record, lean: Record) -> None:
    """Field by field, so that a failure names the first that differs."""
    assert not ordinary.lean
    assert lean.lean
    assert ordinary.steps == lean.steps
    for one, other in zip(ordinary.seen, lean.seen, strict=False):
        assert one == other
    for name in Record.__dataclass_fields__:
        if name != "lean":
            assert getattr(ordinary, name) == getattr(lean, name), name
