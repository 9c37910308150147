"""Small modules as strangers write them, one for each hook and habit. Each draws its weights from a seed of its own."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import hydra.utils
import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.utilities.types import STEP_OUTPUT
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CLASSES = 12, 3
Pair = namedtuple("Pair", "x y")


def network(seed: int = 7, width: int = WIDTH) -> nn.Sequential:
    """The same weights wherever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, CLASSES))


class Plain(pl.LightningModule):
    """Everything as in Lightning's first example."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class ReturnsDict(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch)
        return {"loss": loss, "more": loss.detach() * 2, "text": "kept as it is"}


class SkipsBatches(Plain):
    """Returns None for every third batch, which trains nothing and counts no step."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return None if batch_idx % 3 == 1 else self.loss(batch)


class SkipsEpochs(Plain):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 else None


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class ManualAccumulation(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if (batch_idx + 1) % 2 == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


class ManualScheduler(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        super().training_step(batch, batch_idx)
        schedule: Any = self.lr_schedulers()
        schedule.step()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Adversaries(Plain):
    """Two networks and two optimizers, each toggled and stepped once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = network(8)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizers: Any = self.optimizers()
        for net, optimizer in zip((self.net, self.critic), optimizers, strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.net.parameters(), lr=1e-2),
            torch.optim.SGD(self.critic.parameters(), lr=1e-1),
        ]


class StepsTheCriticMoreOften(Adversaries):
    """The generator steps on every second batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        generator, critic = self.optimizers()  # type: ignore[attr-defined, misc]
        chosen = [(self.critic, critic)] + ([(self.net, generator)] if batch_idx % 2 else [])
        for net, optimizer in chosen:
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()


class WarmsUpInOptimizerStep(Plain):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = self.hparams["lr"] * min(1.0, (self.trainer.global_step + 1) / 5)


class OwnZeroGrad(Plain):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class OwnClipping(Plain):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


class OwnBackward(Plain):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 0.5).backward()


class ScalesGradients(Plain):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()


class Averages(Plain):
    """BYOL's target network: an exponential moving average that the module keeps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.target = network().requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


class HalvesItsRate(Plain):
    def on_train_epoch_end(self) -> None:
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] /= 2


class EpochHooks(Plain):
    """Logs in each hook that may log."""

    def on_train_start(self) -> None:
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch)
        self.seen.append(loss.detach())
        self.log("fine", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean_of_epoch", torch.stack(self.seen).mean(), sync_dist=True)
        self.seen.clear()

    def on_validation_epoch_end(self) -> None:
        self.log("epoch_ended", float(self.current_epoch), sync_dist=True)


class BuiltInSetup(Plain):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters({"lr": 0.1})

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = network(width=self.trainer.datamodule.width)  # type: ignore[attr-defined]


class BuiltInConfigureModel(Plain):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters({"lr": 0.1})
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


class NoOptimizer(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.9)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return None


class OwnLoaders(Plain):
    """The loaders live in the module."""

    def train_dataloader(self) -> Any:
        from tests.oracle.data import Rows

        return torch.utils.data.DataLoader(Rows(48, 5), batch_size=8)

    def val_dataloader(self) -> Any:
        from tests.oracle.data import Rows

        return torch.utils.data.DataLoader(Rows(16, 6), batch_size=8)


class MovesBatches(Plain):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1.0, batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return Pair(*[part.to(device) for part in batch])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Pair(batch.x * 0.5, batch.y)


class NamedBatches(Plain):
    """Batches are dicts, as those of Hugging Face."""

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch["input_ids"]), batch["labels"])


class Ragged(Plain):
    """Targets of a length of their own for each sample, as in detection."""

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        outputs = self(torch.stack(list(inputs)))
        return torch.stack([(out[0] - target.sum()) ** 2 for out, target in zip(outputs, targets, strict=True)]).mean()


class Measured(Plain):
    """torchmetrics objects are logged, and reset by Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.val_accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.val_accuracy)


class OwnCallbacks(Plain):
    def configure_callbacks(self) -> Any:
        return [pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=100.0)]


class Buffers(Plain):
    """Running statistics that the training step keeps, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        self.count += 1
        return self.loss(batch) * (1 + 0.01 * self.count.item())


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class ReadsTheIterator(Plain):
    def training_step(self, dataloader_iter: Any) -> STEP_OUTPUT:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class TwoSources(Plain):
    """Batches of several loaders under names."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(batch["a"]) + 0.5 * self.loss(batch["b"])


class ListedSources(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return sum(self.loss(part) for part in batch)  # type: ignore[return-value]


class SeveralValidations(Plain):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        self.log("val_loss", self.loss(batch), sync_dist=True)


class LogsByItself(Plain):
    """Writes through the logger and what is behind it, on every rank and without a guard."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        logger: Any = self.logger
        logger.log_metrics({"own": 1.0}, step=self.global_step)
        logger.experiment  # noqa: B018
        return self.loss(batch)


class Checkpoints(Plain):
    """Keeps a state of its own in the checkpoint."""

    kept = 0

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        self.kept += 1
        return self.loss(batch) * (1 + 0.001 * self.kept)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = self.kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["kept"]


class TakesConfig(Plain):
    """Its part of the configuration as it is, read by attributes."""

    def __init__(self, cfg: DictConfig) -> None:
        super(Plain, self).__init__()
        self.save_hyperparameters()
        self.cfg = cfg
        self.net = network(width=cfg.sizes[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.cfg.optim.lr)


class TakesPartials(Plain):
    """The optimizer and the schedule as functions that lack the parameters, as in lightning-hydra-template."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any) -> None:
        super(Plain, self).__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams["optimizer"](params=self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.hparams["scheduler"](optimizer=optimizer)}


class TakesNodes(Plain):
    """`_recursive_: false`: what is below is called by the module itself."""

    def __init__(self, net: Any, optimizer: Any) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = hydra.utils.instantiate(net)

    def configure_optimizers(self) -> Any:
        return hydra.utils.instantiate(self.optimizer, self.parameters())


class TakesContainers(Plain):
    """What arrives is what Hydra hands over: the weights depend on the types."""

    def __init__(self, plain: Any, config: Any, nested: Any) -> None:
        super().__init__()
        seen = [type(one).__name__ for one in (plain, config, config["more"], nested, nested[0])]
        self.scale = sum(len(name) for name in seen) / 100
        with torch.no_grad():
            self.net[0].bias.fill_(self.scale)
