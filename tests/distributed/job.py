"""One rank of the multi-process tests: trains each scenario of a JSON list and writes what it saw.

`python job.py SCENARIOS.json OUTPUT_FOLDER`, started by `fork_ranks.py`. Scenarios run one after the
other in the same processes, because starting Python, torch and Lightning costs more than training these models.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer import strategies
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import MODEL, StoredCheckpoint
from trainer.config.strategy import STRATEGIES
from trainer.optimizers import LowMemoryAdamW
from trainer.strategies.deferred import construct

GLOBAL_BATCH = 16
EPOCH = 1000
"""Steps; all runs end inside the first epoch."""
REDUCE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
"""What FSDP2 calls, in torch 2.13 and before."""
WIDTH = 12
"""Not a multiple of every world size times what the flat buffers hold: padding must be right, too."""


class Net(nn.Module):
    """Repeated blocks, a tied layer, a frozen one, a buffer; odd sizes, so that shards are uneven."""

    def __init__(self, batch_norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.body = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.body[0].up.weight  # tied
        self.head = nn.Linear(WIDTH, 3)
        self.unused = nn.Linear(2, 2) if unused else None
        self.register_buffer("scale", torch.tensor([0.5]))

    def blocks(self) -> list[nn.Module]:
        return list(self.body)

    def tensor_parallel(self) -> dict[str, str]:
        return {"body.[12].up": "column", "body.[12].down": "row"}  # not body.0, whose weight is tied

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = torch.tanh(self.first(inputs))
        for block in self.body:
            features = block(features)
        # cast: DeepSpeed's bf16 is without autocast, and leaves buffers in fp32
        features = self.norm(self.frozen(features)) * self.scale.to(features.dtype)
        return self.head(torch.tanh(self.last(features)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.down(torch.relu(self.up(features)))


class Task(LightningModule):
    def __init__(self, net: nn.Module, learning_rate: float = 0.01, states: str | None = None) -> None:
        super().__init__()
        self.net = net
        self.states: Any = states
        self.learning_rate = learning_rate
        self.losses: list[torch.Tensor] = []
        self.gradient_bytes = 0
        """The most bytes of gradients on this rank after a backward pass under FSDP2."""

    def on_after_backward(self) -> None:
        groups = [one._get_fsdp_state()._fsdp_param_group for one in self.modules() if isinstance(one, FSDPModule)]
        parameters = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
        kept = [getattr(getattr(one, "_unsharded_param", None), "grad", None) for one in parameters]
        kept += [one.unsharded_accumulated_grad for one in parameters]
        kept += [one.sharded_param.grad.to_local() for one in parameters if one.sharded_param.grad is not None]
        self.gradient_bytes = max(self.gradient_bytes, sum(one.nbytes for one in kept if one is not None))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.losses.append(loss.detach().double().cpu())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        decay = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        if self.states is not None:
            optimizer = LowMemoryAdamW(groups, lr=self.learning_rate, states=self.states)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Steps(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Micro-batch `index` of this rank: its contiguous part of the global batch, as the project's sampler cuts it."""

    def __init__(self, rank: int, ranks: int, accumulate: int) -> None:
        self.rank, self.accumulate = rank, accumulate
        self.size = GLOBAL_BATCH // (ranks * accumulate)

    def __len__(self) -> int:
        return EPOCH * self.accumulate

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, micro = divmod(index, self.accumulate)
        generator = torch.Generator().manual_seed(1000 + step)
        inputs = torch.randn(GLOBAL_BATCH, 5, generator=generator)
        labels = (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()
        begin = (self.rank * self.accumulate + micro) * self.size
        return inputs[begin : begin + self.size], labels[begin : begin + self.size]


class From(Sampler[int]):
    """Resumes where the checkpoint ended, as the project's sampler does."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.count))


def run(scenario: dict[str, Any], store: CheckpointStore) -> dict[str, Any]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options_class = STRATEGIES[scenario["strategy"]]
    given = scenario.get("options", {})
    assert set(given) <= {field.name for field in fields(options_class)}
    options = options_class(**given)
    data_rank, data_ranks = strategies.data_parallel(options, rank, world_size)
    accumulate = scenario.get("accumulate", 1)
    first, last = scenario.get("from_step", 0), scenario["steps"]
    torch.manual_seed(7)
    defers = strategies.defers(options, world_size, "cpu")
    net = construct(lambda: Net(**scenario.get("net", {}))) if defers else Net(**scenario.get("net", {}))
    module = Task(net, states=scenario.get("states"))
    on_meta = sum(parameter.is_meta for parameter in module.parameters())
    writer = CheckpointWriter(store, asynchronous=scenario.get("asynchronous", True))
    trainer = Trainer(
        accelerator="gpu" if scenario.get("cuda") else "cpu",
        devices=world_size,
        strategy=strategies.build(
            options, world_size, torch.device("cuda", rank) if scenario.get("cuda") else torch.device("cpu"), 60.0
        ),
        plugins=[TorchElasticEnvironment(), RunCheckpointIO(writer)],
        precision=scenario.get("precision", "32-true"),
        max_steps=last,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=scenario.get("clip"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(store.directory),
    )
    steps = Steps(data_rank, data_ranks, accumulate)
    loader = DataLoader(steps, batch_size=None, sampler=From(first * accumulate, len(steps)))
    load = scenario.get("load")
    with mock.patch.object(dist, REDUCE, wraps=getattr(dist, REDUCE)) as reduced:
        trainer.fit(module, loader, ckpt_path=load, weights_only=True if load else None)
    losses = torch.stack(module.losses).view(-1, accumulate).mean(1)
    if world_size > 1:
        dist.all_reduce(losses)
        losses /= world_size
    trainer.save_checkpoint(store.path(last), storage_options={"step": last, "world_size": world_size})
    writer.wait()
    failure = writer.take_failure()
    if dist.is_initialized():
        dist.barrier()
    found: dict[str, Any] = {"on_meta": on_meta, "gradient_bytes": module.gradient_bytes}
    found["reductions"] = reduced.call_count
    found |= {"losses": losses.tolist(), "global_step": trainer.global_step, "failure": failure and str(failure)}
    if failure is None:
        stored = StoredCheckpoint(store.path(last))
        found["weights"] = _digest(stored.whole(MODEL))
        found["state"] = _digest(stored.whole("optimizer/"))
        found["rates"] = [[group["lr"] for group in groups] for groups in stored.optimizers.groups]
    return found


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    output = Path(sys.argv[2])
    results = {}
    for scenario in scenarios:
        store = CheckpointStore(output / scenario["name"])
        started = time.monotonic()
        results[scenario["name"]] = run(scenario, store)
        print(scenario["name"], f"{time.monotonic() - started:.2f} s", flush=True)
    if os.environ["RANK"] == "0":
        (output / f"results-{Path(sys.argv[1]).stem}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
