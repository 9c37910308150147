"""One rank of the test of the lean loop on several ranks, started by `fork_ranks.py`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from tests.train.test_loop import Hooked, Logs
from tests.train.two_loops import Net, Record, assert_same, loader, train
from trainer import strategies
from trainer.config.strategy import STRATEGIES
from trainer.train.loop import use_lean_loop

SCENARIOS: list[tuple[type[LightningModule], dict[str, Any]]] = [
    (Net, {}),
    (Net, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
    (Logs, {"accumulate_grad_batches": 2, "val_check_interval": 2}),
    (Hooked, {"precision": "bf16-mixed"}),
]


SHARDED = ("fsdp", "deepspeed_zero2")
"""Strategies that do parts of a step in their own way, which the lean loop must leave to them."""


def counted(lean: bool, make: type[LightningModule], options: dict[str, Any]) -> tuple[Record, int]:
    """The record, and how many broadcasts the training made."""
    original = distributed.broadcast
    calls = 0

    def broadcast(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **more)

    distributed.broadcast = broadcast
    try:
        return train(lean, make(), strategy="ddp", devices=2, **options), calls
    finally:
        distributed.broadcast = original


class Losses(Net):
    """Keeps the losses: each shows whether all the steps before it were the same, whoever holds the weights."""

    def __init__(self) -> None:
        super().__init__({"interval": "step"})
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def sharded(name: str, lean: bool) -> tuple[Any, ...]:
    """What can be compared where each rank holds a part of the weights."""
    torch.manual_seed(3)
    module = Losses()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies.build(STRATEGIES[name](), 2, torch.device("cpu"), 60.0),
        plugins=[TorchElasticEnvironment()],
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if lean:
        use_lean_loop(trainer)
    trainer.fit(module, loader())
    return (
        module.losses,
        trainer.global_step,
        trainer.fit_loop.state_dict(),
        trainer.optimizers[0].param_groups[0]["lr"],
    )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for make, options in SCENARIOS:
        ordinary, before = counted(False, make, options)
        lean, after = counted(True, make, options)
        assert_same(ordinary, lean)
        batches = lean.loops["epoch_loop.batch_progress"]["total"]["ready"]
        assert before - after >= batches, (before, after, batches)
        gathered: list[Any] = [None, None]
        distributed.all_gather_object(gathered, lean.weights)
        assert gathered[0] == gathered[1], "the ranks drifted apart"
    for name in SHARDED:
        assert sharded(name, False) == sharded(name, True), name
    print(f"{len(SCENARIOS) + len(SHARDED)} scenarios equal", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
