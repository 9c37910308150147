"""One rank of `test_manual_optimization.py`: what a module that optimizes manually has learnt. Writes a JSON file.

`python manual_rank.py OUTPUT.json`
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import strategies
from trainer.config.strategy import STRATEGIES
from trainer.core.errors import UserError


class Two(LightningModule):
    """A generator and a discriminator, each with its optimizer; one of them is called twice before it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.judges = nn.ModuleList([nn.Linear(8, 4)])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        maker, judge = self.optimizers()  # type: ignore[misc]
        made = self.maker(batch[0])
        self.toggle_optimizer(judge)
        loss = self.judges[0](batch[0]).square().mean() + (self.judges[0](made.detach()) - 1).square().mean()
        judge.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(judge, 0.1, "norm")
        judge.step()
        self.untoggle_optimizer(judge)
        maker.zero_grad()
        self.manual_backward(self.judges[0](made).square().mean())
        maker.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.maker.parameters(), 0.1), torch.optim.SGD(self.judges.parameters(), 0.1)


class Loose(Two):
    """Has a parameter that is in none of its networks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def weights_after(name: str, module: LightningModule) -> list[float]:
    """Train on 2 ranks, each with its own samples; the weights, whole."""
    options: Any = STRATEGIES[name](**({"find_unused_parameters": True} if name == "ddp" else {}))
    strategy = strategies.build(options, 2, torch.device("cpu"), 60.0)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False,
    )
    generator = torch.Generator().manual_seed(TorchElasticEnvironment().global_rank())
    data = TensorDataset(torch.randn(64, 8, generator=generator))
    trainer.fit(module, DataLoader(data, 8))
    values = [getattr(one, "full_tensor", lambda one=one: one)() for one in module.parameters()]
    return torch.cat([one.detach().flatten() for one in values]).tolist()


def main(output: Path) -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"start": torch.cat([one.detach().flatten() for one in Two().parameters()]).tolist()}
    for name in ("ddp", "fsdp"):
        found[name] = weights_after(name, Two())
    try:
        weights_after("fsdp", Loose())
    except UserError as error:
        found["refused"] = str(error)
    if TorchElasticEnvironment().global_rank() == 0:
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
