"""Small modules, data and callbacks as users write them, each with one habit that a resume may lose."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torchmetrics
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

Batch = tuple[Tensor, Tensor]


def rows(count: int, seed: int) -> TensorDataset:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Data(LightningDataModule):
    """Four batches an epoch, in the order in which they are."""

    def train_dataloader(self) -> Any:
        return DataLoader(rows(32, 1), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(rows(16, 2), batch_size=8)


class Plain(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)

    def scheduled(self, kind: Any, interval: str = "step", monitor: str | None = None, **options: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = {"scheduler": kind(optimizer, **options), "interval": interval, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class WithoutNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


class Dropout(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Dropout(0.2))

    def on_train_start(self) -> None:
        torch.rand(3)  # moves the generators, in each attempt


class PlateauByEpoch(Plain):
    def configure_optimizers(self) -> Any:
        return self.scheduled(lr_scheduler.ReduceLROnPlateau, "epoch", "val_loss", patience=0, threshold=10.0)


class PlateauByStep(Plain):
    def configure_optimizers(self) -> Any:
        return self.scheduled(lr_scheduler.ReduceLROnPlateau, "step", "train_loss", patience=0, threshold=10.0)


class PlateauOfTheEpochsMean(Plain):
    def configure_optimizers(self) -> Any:
        return self.scheduled(lr_scheduler.ReduceLROnPlateau, "epoch", "train_loss_epoch", patience=0, threshold=1e-9)


class Estimated(Plain):
    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return self.scheduled(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=steps)


class InSequence(Plain):
    def configure_optimizers(self) -> Any:
        def schedule(optimizer: Any) -> Any:
            warmup = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3)
            falling = lr_scheduler.CosineAnnealingLR(optimizer, 9)
            return lr_scheduler.SequentialLR(optimizer, [warmup, falling], milestones=[3])

        return self.scheduled(schedule)


class ByEpochAndByStep(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        by_step = {"scheduler": lr_scheduler.StepLR(optimizer, 2), "interval": "step", "frequency": 2}
        return [optimizer], [lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.8**epoch), by_step]


class HooksOfItsOwn(Plain):
    """The moving average of BYOL, and counts, in the module's own hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(8, 8)
        self.register_buffer("ends", torch.zeros(3))

    def on_train_batch_end(self, *arguments: Any) -> None:
        with torch.no_grad():
            self.target.weight.mul_(0.9).add_(self.net[0].weight, alpha=0.1)
        self.ends[0] += 1

    def on_train_epoch_end(self) -> None:
        self.ends[1] += 1

    def on_validation_epoch_end(self) -> None:
        self.ends[2] += 1


class SkipsTheRest(Plain):
    """The last batch of its first epoch."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(8, 2)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer, network in zip(self.optimizers(), (self.net, self.critic), strict=True):  # type: ignore[arg-type]
            loss = nn.functional.cross_entropy(network(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2), torch.optim.Adam(self.critic.parameters(), lr=1e-2)


class OneAccumulates(TwoOptimizers):
    """A step of the first optimizer on each batch, of the second on every third."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        self.manual_backward(nn.functional.cross_entropy(self.critic(batch[0]), batch[1]))
        if (self.trainer.fit_loop.total_batch_idx + 1) % 3 == 0:
            second.step()
            second.zero_grad()


class Measured(Plain):
    """A torchmetrics object that is logged by epoch, and a buffer that no checkpoint of Lightning's has."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("binary")
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.accuracy(self(batch[0]).argmax(1), batch[1])
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.seen += 1
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.seen)


class LogsOnce(Plain):
    """Values that an epoch logs at its beginning only; a schedule reads one of them."""

    def on_train_epoch_start(self) -> None:
        self.log("began", float(self.current_epoch))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 0:
            self.log("first", loss, on_step=False, on_epoch=True)
        if batch_idx < 2:
            self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def configure_optimizers(self) -> Any:
        return self.scheduled(lr_scheduler.ReduceLROnPlateau, "epoch", "most", patience=0, threshold=10.0)


class AddsAGroup(Plain):
    """A parameter that the optimizer gets in the middle of the training."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) + self.bias

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": [self.bias], "lr": 0.5})


class Head(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Keeps(Callback):
    """State by both of a callback's ways, with an effect on the training."""

    def __init__(self) -> None:
        self.total, self.epochs = 0.0, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *arguments: Any) -> None:
        self.total += float(outputs["loss"])
        trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + self.total + self.epochs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = state_dict["total"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["epochs_kept"] = self.epochs

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.epochs = checkpoint["epochs_kept"]


class Crash(Callback):
    """Raises before this batch, counted over all epochs; -n: in the validation of epoch n."""

    at: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        at = Crash.at
        if at is not None and 0 <= at <= trainer.fit_loop.total_batch_idx:
            raise RuntimeError("killed on request")

    def on_validation_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        at = Crash.at
        if at is not None and at < 0 and trainer.current_epoch == -at:
            raise RuntimeError("killed on request, in a validation")


class Scores(Plain):
    """Logs what it is told to, by the name of the metric, after each validation."""

    def __init__(self, scores: dict[str, list[float]]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        for name, values in self.scores.items():
            self.log(name, float(values[self.trainer.current_epoch]))


class HigherIsBetter(Plain):
    """A torchmetrics object under a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.measure = torchmetrics.Accuracy("binary")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.measure(torch.full_like(batch[1], self.trainer.current_epoch % 2), torch.zeros_like(batch[1]))
        self.log("val_measure", self.measure)


class SeveralLoaders(Data):
    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), DataLoader(rows(16, 3), batch_size=8)]


class OfSeveralLoaders(Plain):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class WithoutValidation(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(rows(32, 1), batch_size=8)


class Counts(Plain):
    """In a plain attribute, which no checkpoint has, with an effect later than the resume."""

    count = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.count = self.count + 1
        return super().training_step(batch, batch_idx) * (1.1 if self.count > 7 else 1.0)


class Unstable(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + int.from_bytes(os.urandom(4), "big") / 2**40)


class Drifts(Plain):
    def on_train_start(self) -> None:
        if self.trainer.global_step:
            next(self.parameters()).data.add_(1e-6)


class ChangesTheRate(Callback):
    """By a count of its own, which it does not save."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        self.batches += 1
        trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + self.batches)


class OwnOrder(Data):
    """A stream in an order that is drawn from a generator of its own."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)

        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                samples = rows(32, 1)
                return (samples[int(index)] for index in torch.randperm(32, generator=generator))

            def __len__(self) -> int:
                return 32

        return DataLoader(Stream(), batch_size=8)
