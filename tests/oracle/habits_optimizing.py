"""More optimizers and schedules as strangers write them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.nn import functional

from tests.oracle.modules import Manual, Plain, network


class TimmStyle(Plain):
    """`lr_scheduler_step` gives the epoch to the schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        return [optimizer], [{"scheduler": schedule, "interval": "epoch", "name": "timm"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch + 1)


class WarmsUp(Plain):
    """Lightning's documented warm-up: super().optimizer_step, then the rate."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.trainer.global_step < 4:
            scale = min(1.0, (self.trainer.global_step + 1) / 4)
            for group in optimizer.param_groups:
                group["lr"] = scale * 0.1
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class StepsRarely(Plain):
    """Runs the closure at each batch and the optimizer at every second."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class TwoSchedules(Plain):
    """Two schedules of one optimizer, one by step and one by epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        first = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        second = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": first, "interval": "step"}, {"scheduler": second, "interval": "epoch"}]


class Chained(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.NAdam(self.parameters(), lr=0.05)
        both = [
            torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 3),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
        return ({"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ChainedScheduler(both)},)


class LenientPlateau(Plain):
    """Its metric never comes, and the schedule does not insist."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        how = {"scheduler": schedule, "monitor": "never", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": how}


class PlateauOfTraining(Plain):
    """A plateau of the epoch's mean of the training loss, every second epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch)
        self.log("train", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        how = {"scheduler": schedule, "monitor": "train_epoch", "frequency": 2}
        return {"optimizer": optimizer, "lr_scheduler": how}


class Cyclic(Plain):
    """A schedule that moves the momentum, too."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.2, step_size_up=3)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, without its constructor, as public implementations do."""

    def __init__(self, inner: Any, every: int = 3, alpha: float = 0.5) -> None:
        self.inner, self.every, self.alpha, self.count = inner, every, alpha, 0
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for parameter, old in zip(group["params"], slow, strict=True):
                    old.lerp_(parameter.detach(), self.alpha)
                    parameter.data.copy_(old)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class LooksAhead(Plain):
    def configure_optimizers(self) -> Any:
        return Lookahead(torch.optim.SGD(self.parameters(), lr=0.1))


class SparseRows(Plain):
    """A sparse embedding with SparseAdam beside Adam, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.table = torch.nn.Embedding(3, 3, sparse=True)
        with torch.no_grad():
            self.table.weight.fill_(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        first, second = self.optimizers()  # type: ignore[attr-defined, misc]
        first.zero_grad()
        second.zero_grad()
        loss = functional.cross_entropy(self(batch[0]) + self.table(batch[1]), batch[1])
        self.manual_backward(loss)
        first.step()
        second.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01), torch.optim.SparseAdam(
            list(self.table.parameters()), lr=0.01
        )


class TwoWithSchedules(Manual):
    """A GAN's loop: toggled optimizers, two schedules stepped at an epoch's end, accumulated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network(9)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        first, second = self.optimizers()  # type: ignore[attr-defined, misc]
        is_last = (batch_idx + 1) % 2 == 0
        for net, optimizer in ((self.net, first), (self.other, second)):
            with optimizer.toggle_model(sync_grad=is_last):
                self.manual_backward(functional.cross_entropy(net(batch[0]), batch[1]) / 2)
                if is_last:
                    optimizer.step()
                    optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():  # type: ignore[union-attr, attr-defined]
            schedule.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net.parameters(), lr=0.01)
        second = torch.optim.Adam(self.other.parameters(), lr=0.02)
        return (
            {"optimizer": first, "lr_scheduler": torch.optim.lr_scheduler.StepLR(first, 1, 0.5)},
            {"optimizer": second, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(second, 0.5)},
        )


class AddsGroups(Plain):
    """Adds parameters to the optimizer in the middle of training."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: Any) -> Any:
        return self.net(x) + self.bias

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": [self.bias], "lr": 0.5})
