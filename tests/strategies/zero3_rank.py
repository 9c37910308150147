"""One rank of `test_zero3.py`: how much memory ZeRO-3 takes while it partitions a model. Writes a JSON file.

`python zero3_rank.py OUTPUT.json`
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from trainer import strategies
from trainer.config.strategy import DeepspeedZero3
from trainer.strategies.deepspeed_zero import RunDeepSpeedStrategy
from trainer.strategies.deferred import construct

WIDTH, LAYERS = 128, 16


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = construct(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))))
        self.loss = torch.tensor(0.0)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.loss = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Groups by shape, as a module of a user's may make them: they must see the whole parameters."""
        matrices = [one for one in self.parameters() if one.ndim == 2 and one.numel() == WIDTH * WIDTH]
        assert len(matrices) == LAYERS
        return torch.optim.AdamW(matrices, lr=1e-3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still alive, and the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    live = LiveBytes()
    partition = RunDeepSpeedStrategy._partition

    def counted(strategy: Any, module: nn.Module, **named: Any) -> None:
        found["before"] = sum(one.nbytes for one in module.parameters() if not one.is_meta)
        with live:
            partition(strategy, module, **named)
        found["whole_after"] = sum(one.data.nbytes for one in module.parameters())
        found["shards"] = sum(one.ds_tensor.nbytes for one in module.parameters())

    found: dict[str, Any] = {}
    RunDeepSpeedStrategy._partition = counted  # type: ignore[method-assign]
    ranks = int(os.environ["WORLD_SIZE"])
    options = DeepspeedZero3(reduce_bucket_size=1000, allgather_bucket_size=1000)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies.build(options, ranks, torch.device("cpu"), 60.0),
        plugins=[TorchElasticEnvironment()],
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Task()
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, WIDTH)), batch_size=4))
    torch.manual_seed(3)
    whole = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    expected = whole(torch.ones(4, WIDTH)).square().mean()
    found |= {"peak": live.peak, "loss": float(module.loss), "expected": float(expected.detach())}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
