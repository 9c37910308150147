"""More modules as strangers write them: what they log, ask, compute and keep. They build on `modules`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.oracle.modules import CLASSES, WIDTH, Manual, Plain, network


class ReturnsCallbacks(Plain):
    """`configure_callbacks` brings a checkpoint callback and one that stops."""

    def configure_callbacks(self) -> Any:
        return [
            pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=100.0),
            pl.callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
        ]


class LogsCollections(Plain):
    """Collections of torchmetrics, cloned by stage, logged by `log_dict` in every way that it takes."""

    def __init__(self) -> None:
        super().__init__()
        both = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.classification.MulticlassAccuracy(CLASSES),
                "f1": torchmetrics.classification.MulticlassF1Score(CLASSES),
            }
        )
        self.train_metrics, self.val_metrics = both.clone(prefix="train_"), both.clone(prefix="val_")

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        logits = self(batch[0])
        self.log_dict(self.train_metrics(logits, batch[1]), prog_bar=True, sync_dist=True)
        return functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute(), prog_bar=True, sync_dist=True)
        self.val_metrics.reset()


class Reduces(Plain):
    """Every reduction that `log` knows, per step, per epoch, and weighted by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch)
        self.log("last_batch", batch_idx, reduce_fx="max", on_step=False, on_epoch=True, sync_dist=True)
        self.log("sum", loss, reduce_fx=torch.sum, on_step=False, on_epoch=True, sync_dist=True)
        self.log_dict({"a/b": loss, "c d": 1.0}, on_step=True, on_epoch=True, batch_size=3)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss, batch_size=batch_idx + 1, sync_dist=True)
        self.log("val_most", batch_idx + 1, reduce_fx="max", sync_dist=True)
        self.log("val_steps", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("val_of_rank_0", 1.0, rank_zero_only=True)


class LogsInHooks(Plain):
    """Logs from the hooks around the optimizer and the batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = pl.utilities.grad_norm(self, norm_type=2)
        self.log_dict(norms)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("zeroed", 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss_again", outputs["loss"])

    def on_train_epoch_start(self) -> None:
        self.log("epoch_began", float(self.current_epoch))


class AsksItsTrainer(Plain):
    """What is trained depends on what the trainer says of itself."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        trainer: Any = self.trainer
        assert trainer.fit_loop.epoch_loop.batch_idx == batch_idx
        assert trainer.train_dataloader is not None
        assert len(trainer.train_dataloader) == trainer.num_training_batches
        assert trainer.current_epoch == self.current_epoch == trainer.fit_loop.epoch_progress.current.processed
        assert trainer.is_last_batch == (batch_idx + 1 == trainer.num_training_batches)
        assert trainer.datamodule.width == WIDTH
        assert (trainer.training, trainer.validating, trainer.sanity_checking) == (True, False, False)
        assert trainer.lightning_module is self
        known = float(trainer.callback_metrics.get("val_loss", torch.tensor(1.0)))
        told = trainer.num_training_batches + sum(trainer.num_val_batches) + trainer.max_epochs + trainer.global_step
        told += trainer.estimated_stepping_batches + trainer.fit_loop.total_batch_idx + len(trainer.optimizers)
        told += trainer.fit_loop.epoch_loop.total_batch_idx + trainer.accumulate_grad_batches + trainer.max_steps
        return self.loss(batch) * (1 + 0.01 * told + 0.1 * known)


@dataclass
class Options:
    depth: int = 2
    names: tuple[str, ...] = ("a",)


class KeepsNestedHyperParameters(Plain):
    """Nested mappings, a dataclass, a module that is left out, and an example input."""

    def __init__(self, lr: float = 0.1, nested: Any = None, options: Any = None, net: Any = None) -> None:
        super(Plain, self).__init__()
        options = options or Options()
        net = net or network()
        self.save_hyperparameters(ignore=["net"])
        assert self.hparams["nested"] == {"a": {"b": [1, {"c": None}]}}
        self.net = net
        self.example_input_array = torch.zeros(1, WIDTH)


@dataclass
class Sample:
    """A batch with `to`, as users' own classes have it."""

    x: Tensor
    y: Tensor
    note: str = "none"

    def to(self, *args: Any, **options: Any) -> Sample:
        return Sample(self.x.to(*args, **options), self.y.to(*args, **options), "moved")

    def __len__(self) -> int:
        return len(self.x)


class TakesSamples(Plain):
    """Batches of a class of the user's."""

    def loss(self, batch: Any) -> Tensor:
        scale = {"moved": 1.0, "none": 0.5}[batch.note]
        return functional.cross_entropy(self(batch.x), batch.y) * scale


class TakesFields(Plain):
    """Batches with attributes: named tuples and dataclasses."""

    def loss(self, batch: Any) -> Tensor:
        assert type(batch).__name__ in ("Named", "Fields")
        return functional.cross_entropy(self(batch.x), batch.y)


class TakesNestedBatches(Plain):
    """Tensors below mappings and lists, beside strings and None."""

    def loss(self, batch: Any) -> Tensor:
        assert batch["meta"]["names"][0].startswith("row")
        return functional.cross_entropy(self(batch["inputs"][0]), batch["meta"]["y"])


class TakesTheBatchAlone(Plain):
    """Steps without an index."""

    def training_step(self, batch: Any) -> STEP_OUTPUT:  # type: ignore[override]
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        self.log("val_loss", self.loss(batch), sync_dist=True)


class TakesMore(Plain):
    """Steps with open arguments."""

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert len(args) + len(kwargs) == 2
        return self.loss(args[0] if args else kwargs["batch"])


class Compiled(Plain):
    """The network is compiled by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(network(), backend="eager")  # type: ignore[assignment]


class FreezesParts(Plain):
    """A part in evaluation mode for good, which every epoch has to keep so."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        assert not self.drop.training
        assert self.net.training
        return self.loss(batch)


class OwnModes(Plain):
    """Overrides how validation changes the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[str] = []

    def on_validation_model_eval(self) -> None:
        self.changes.append("eval")
        self.eval()

    def on_validation_model_train(self) -> None:
        self.changes.append("train")
        self.train()

    def on_validation_model_zero_grad(self) -> None:
        self.changes.append("zero")
        super().on_validation_model_zero_grad()

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(batch) * (1 + 0.1 * len(self.changes))


class Talks(Plain):
    """Gathers, reduces and waits by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch)
        everywhere = self.all_gather(loss.detach()).float().mean()
        reduced = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.trainer.strategy.barrier("between")
        self.trainer.strategy.broadcast({"rank": self.global_rank})
        self.print("said once")
        assert torch.allclose(everywhere, torch.as_tensor(reduced))
        return loss * (1 + 0.1 * everywhere)


class Doubles(Plain):
    """A loss in double precision, and a checkpointed part."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.net[0], x, use_reentrant=False)
        return self.net[2](self.net[1](hidden))

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(batch).double()


class Tied(Plain):
    """Parameters in two places, of no dimension, in containers, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.net
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.more = nn.ParameterDict({"b": nn.Parameter(torch.zeros(CLASSES))})
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x) * self.scale + self.more["b"]


class Lazy(Plain):
    """The width of the first layer is known with the first batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, CLASSES))

    def setup(self, stage: str) -> None:
        torch.manual_seed(3)
        self(torch.zeros(1, WIDTH))


class Penalised(Manual):
    """A gradient penalty, as in WGAN-GP: a gradient of a gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizer: Any = self.optimizers()
        x = batch[0].clone().requires_grad_()
        out = self(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = functional.cross_entropy(out, batch[1]) + 0.1 * (gradient.norm(dim=1) - 1).pow(2).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Sharpness(Manual):
    """SAM: two backward passes a step, the second from moved weights."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        moved = []
        with torch.no_grad():
            for parameter in self.net.parameters():
                assert parameter.grad is not None
                moved.append(parameter.grad * 0.05)
                parameter.add_(moved[-1])
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter, change in zip(self.net.parameters(), moved, strict=True):
                parameter.sub_(change)
        optimizer.step()
        optimizer.zero_grad()


class AveragedCopy(Plain):
    """torch's own average of a network, as a part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = torch.optim.swa_utils.AveragedModel(
            self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        self.slow.requires_grad_(False)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.slow.update_parameters(self.net)


class StopsItself(Plain):
    """Ends the training by the trainer's flag from a hook of its own."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 4:
            self.trainer.should_stop = True


class SavesByHand(Plain):
    """Writes a checkpoint of Lightning's by hand at the end of each epoch."""

    def on_train_epoch_end(self) -> None:
        import tempfile
        from pathlib import Path

        folder = self.trainer.strategy.broadcast(tempfile.mkdtemp())
        self.trainer.save_checkpoint(Path(folder) / "hand.ckpt")
        if self.trainer.is_global_zero:
            loaded = torch.load(Path(folder) / "hand.ckpt", weights_only=False)
            assert loaded["global_step"] == self.trainer.global_step


class Augments(Plain):
    """Changes batches after they were moved, in training only."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            return [batch[0] + 0.1 * self.trainer.global_step, batch[1]]
        return batch


class SkipsWhatIsNone(Plain):
    """The collate function gave nothing for a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return None if batch is None else self.loss(batch)


class TwoValidationNames(Plain):
    """Names its validation loaders itself."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        name = ["val_near", "val_far"][dataloader_idx]
        self.log(name, self.loss(batch), add_dataloader_idx=False, sync_dist=True, prog_bar=True)


class CollectsOutputs(Plain):
    """Lists that hooks fill and empty, as after the removal of `validation_epoch_end`."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        self.outputs.append(self.loss(batch))
        return {"val_loss": self.outputs[-1]}

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", torch.stack(self.outputs).mean(), sync_dist=True)
        self.outputs.clear()


class Child(Plain):
    """A LightningModule within a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.net(x)


class TrainsTwoBatchesBack(Plain):
    """Keeps the batch before as a queue, as MoCo does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, WIDTH))

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch) + self.net(self.queue).pow(2).mean()
        gathered = self.all_gather(batch[0]).reshape(-1, WIDTH)
        self.queue = gathered[:8].detach().clone()
        return loss


class FirstAndMore(Plain):
    """The second of two loaders is None where it has ended."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        loss = self.loss(batch["a"])
        return loss if batch["b"] is None else loss + self.loss(batch["b"])


class FirstAndListed(Plain):
    """Loaders in a list within a mapping."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(batch["a"]) + self.loss(batch["b"][0])


class ValidatesPairs(Plain):
    """A validation batch holds one of each loader."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch["a"]) + self.loss(batch["b"]), sync_dist=True)
