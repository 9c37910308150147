"""LightningModules as users write them, whose networks are made, sharded or split in `setup` or `configure_model`.

Each starts from the same weights and reads the same data, so that all must end with the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, WIDTH, HIDDEN, CLASSES = 64, 6, 8, 4


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
        return DataLoader(TensorDataset(inputs, torch.arange(SAMPLES) % CLASSES), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()  # one of its own, in Lightning


class Constant(nn.Linear):
    """Starts from values that are the same however its parameters are sharded."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.fill_(0.25)
            self.bias.fill_(0.0)


def network(width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES))


class InInit(LightningModule):
    """The plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.make()

    def make(self) -> None:
        self.net = network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.forward(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.net(inputs)
        return output

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class FromElsewhere(InInit):
    """Starts from other weights."""

    def make(self) -> None:
        super().make()
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))


class InSetup(InInit):
    """Made when the data is known."""

    def make(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        inputs, _ = self.trainer.datamodule.train_dataloader().dataset[0]  # type: ignore[attr-defined]
        if not hasattr(self, "net"):
            self.net = network(*inputs.shape)


class InConfigureModel(InInit):
    def __init__(self) -> None:
        self.net: Any = None
        super().__init__()
        self.net = None

    def make(self) -> None:
        pass

    def configure_model(self) -> None:
        if self.net is None:  # called again, as Lightning's docs ask
            self.net = network()


class Filled(InInit):
    """Made at once, given its values later: where parameters are deferred, they must be there by then."""

    def setup(self, stage: str) -> None:
        self.net.load_state_dict(network().state_dict())

    def make(self) -> None:
        self.net = network()
        nn.init.zeros_(self.net[0].weight)


class Shards(InConfigureModel):
    """FSDP2 as in Lightning's docs of ModelParallelStrategy."""

    axes: Any = "data_parallel"

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = network()
        assert self.device_mesh is not None
        mesh = self.device_mesh[self.axes]
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class ShardsByTorchsNames(Shards):
    axes = ("dp_replicate", "dp_shard")


class ShardsSome(InConfigureModel):
    """Leaves a layer whole, whose gradients somebody must average."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()
            assert self.device_mesh is not None
            fully_shard(self.net[2], mesh=self.device_mesh["dp_shard"])


class Splits(InConfigureModel):
    """Tensor parallel layers."""

    axis = "tensor_parallel"

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = network()
        assert self.device_mesh is not None
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh[self.axis], plan)  # type: ignore[arg-type]


class SplitsAndShards(Splits):
    axis = "tp"

    def configure_model(self) -> None:
        if self.net is None:
            super().configure_model()
            assert self.device_mesh is not None
            assert self.device_mesh["data_parallel"].size() * self.device_mesh["tensor_parallel"].size() == 2
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class OnMeta(InConfigureModel):
    """No memory before it is sharded."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = nn.Sequential(Constant(WIDTH, HIDDEN), nn.Tanh(), Constant(HIDDEN, CLASSES))
            assert self.device_mesh is not None
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class AsOnMeta(InInit):
    """What `OnMeta` must equal."""

    def make(self) -> None:
        self.net = nn.Sequential(Constant(WIDTH, HIDDEN), nn.Tanh(), Constant(HIDDEN, CLASSES))


class Frozen(InInit):
    """With Lightning alone: what `finetune.freeze=[net.0]` does."""

    def make(self) -> None:
        super().make()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=0.01)


class InSetupFiltered(InSetup):
    """Gives the optimizer what is trained."""

    configure_optimizers = Frozen.configure_optimizers


class StepsDirectly(InInit):
    """Past Lightning, which counts no step of it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.training:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class NoOptimizer(InInit):
    """Measures what never changes; Lightning counts its batches as steps."""

    def configure_optimizers(self) -> Any:
        return None


class Bank(LightningModule):
    """A running mean of what it has seen, moved by hand; no parameters, and Lightning counts no step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen += 1
        self.mean += (batch[0].mean(0) - self.mean) / self.seen
        self.log("spread", self.mean.norm())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", (batch[0] - self.mean).square().mean())

    def configure_optimizers(self) -> Any:
        return None


class BankWithList(Bank):
    def configure_optimizers(self) -> Any:
        return []
