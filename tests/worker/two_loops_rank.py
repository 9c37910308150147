"""One rank of the test of the lean loop on several ranks, started by torchrun."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as distributed
from lightning.pytorch import LightningModule
from test_loop import Hooked, Logs
from two_loops import Net, Record, assert_same, train

SCENARIOS: list[tuple[type[LightningModule], dict[str, Any]]] = [
    (Net, {}),
    (Net, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
    (Logs, {"accumulate_grad_batches": 2, "val_check_interval": 2}),
    (Hooked, {"precision": "bf16-mixed"}),
]


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
    print(f"{len(SCENARIOS)} scenarios equal", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
