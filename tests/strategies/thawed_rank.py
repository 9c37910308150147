"""One rank of `test_thawed.py`: trains with a layer that is frozen for one epoch, under our DDP and alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.utils.data import DataLoader, DistributedSampler

from tests.oracle.callbacks import Thaw
from tests.oracle.data import Rows
from tests.oracle.modules import Plain
from trainer import strategies
from trainer.config.strategy import STRATEGIES
from trainer.train.loop import use_lean_loop
from trainer.train.save_points import use_save_points


class OnEpochStart(Plain):
    """Thaws its first layer in its own hook, which runs behind those of the callbacks."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(make: Any, callbacks: list[Any], ranks: int, lean: bool) -> list[torch.Tensor]:
    """The weights after three epochs of 48 rows in global batches of 16."""
    rows = Rows(48, 1)
    sampler = DistributedSampler(rows, shuffle=False) if ranks > 1 else None
    module = make()
    if make is OnEpochStart:
        module.net[0].requires_grad_(False)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies.build(STRATEGIES["ddp" if ranks > 1 else "single"](), ranks, torch.device("cpu"), 60.0),
        plugins=[TorchElasticEnvironment() if ranks > 1 else LightningEnvironment()],
        callbacks=callbacks,
        max_epochs=3,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    use_lean_loop(trainer) if lean else use_save_points(trainer)
    trainer.fit(module, DataLoader(rows, batch_size=16 // ranks, sampler=sampler))
    return [parameter.detach().clone() for parameter in module.parameters()]


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for make in (Plain, OnEpochStart):
        callbacks = [Thaw] if make is Plain else []
        begun = list(make().parameters())
        alone = trained(make, [one() for one in callbacks], 1, lean=True)
        assert not any(torch.equal(*pair) for pair in zip(alone, begun, strict=True))
        for lean in (True, False):
            for mine, expected in zip(trained(make, [one() for one in callbacks], 2, lean), alone, strict=True):
                theirs = mine.clone()
                dist.broadcast(theirs, src=0)
                assert torch.equal(mine, theirs), (make, lean)
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    print("as one process")


if __name__ == "__main__":
    main()
