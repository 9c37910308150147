"""One rank of test_buffers.py: trains small networks under DDP and writes what each scenario has come to."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from trainer import strategies
from trainer.config.strategy import Ddp

STEPS, FREEZES_AT = 6, 4
"""With a validation in the middle and one at the end."""


class Counting(nn.Module):
    """A buffer that training reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(features.detach().mean(0), 0.5)
        return features - self.mean


class Task(LightningModule):
    def __init__(self, *middle: nn.Module, freezes: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 2))
        self.freezes = freezes
        self.losses: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.freezes and self.global_step >= FREEZES_AT:
            self.net[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """The buffers as the first batch of each validation finds them; those of training, and how often they were sent."""

    def __init__(self) -> None:
        self.evaluated: list[Any] = []
        self.sent = 0

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *more: Any) -> None:
        self.evaluated.append([buffer.tolist() for buffer in pl_module.buffers()])


def loader(rank: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(STEPS * 8, 3, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8)


def run(kind: str, chosen: str, rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    middle = {"other": [Counting(), nn.BatchNorm1d(4)], "none": [nn.LayerNorm(4)]}.get(kind, [nn.BatchNorm1d(4)])
    module = Task(*middle, freezes=kind == "frozen")
    watch = Watch()
    sync = DistributedDataParallel._sync_buffers

    def counted(self: DistributedDataParallel) -> None:
        watch.sent += 1
        sync(self)

    DistributedDataParallel._sync_buffers = counted  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies.build(Ddp(broadcast_buffers=chosen), 2, torch.device("cpu"), 60.0),
        plugins=[TorchElasticEnvironment()],
        callbacks=[watch, *([WeightAveraging()] if kind == "averaged" else [])],
        max_steps=STEPS,
        val_check_interval=STEPS // 2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )
    trainer.fit(module, loader(rank), loader(9))
    DistributedDataParallel._sync_buffers = sync  # type: ignore[method-assign]
    state = {name: value.tolist() for name, value in module.state_dict().items()}
    return {"losses": module.losses, "sent": watch.sent, "evaluated": watch.evaluated, "state": state}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
    scenarios = [tuple(one) for one in json.loads(sys.argv[1])]
    found = {"-".join(one): run(*one, rank, folder) for one in scenarios}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
