"""A rank of tests/strategies/test_sequence_parallel.py: trains a transformer with `tp` in several ways."""

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
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from trainer import strategies
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import MODEL, StoredCheckpoint
from trainer.config.strategy import Tp
from trainer.models.linear_cross_entropy import CHUNK_BYTES, IGNORED
from trainer.models.transformer import Transformer

STEPS, LENGTH, VOCABULARY = 3, 12, 24
WAYS: dict[str, dict[str, Any]] = {
    "gpt2": {"model": {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True}},
    "gpt2-sequence": {
        "model": {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True},
        "sequence_parallel": True,
        "activation_checkpointing": "full",
    },
    "untied": {"model": {"tied": False}},
    "untied-sequence": {"model": {"tied": False}, "sequence_parallel": True, "loss_parallel": True},
    "bf16": {"precision": "bf16-mixed"},
    "bf16-sequence": {"precision": "bf16-mixed", "sequence_parallel": True},
}


class Task(LightningModule):
    def __init__(self, net: Transformer) -> None:
        super().__init__()
        self.net, self.losses, self.lengths = net, [], set()
        for block in net.body:
            block.register_forward_pre_hook(lambda block, inputs: self.lengths.add(inputs[0].shape[1]))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        targets = batch[:, 1:].clone()
        targets[0, : batch_idx + 1] = IGNORED
        if batch_idx % 2:
            logits = self.net(batch[:, :-1])
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        else:
            total, count, _ = self.net(batch[:, :-1], targets)
            loss = total / count
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        total, _, correct = self.net(batch[:, :-1], batch[:, 1:])
        self.evaluated = [total.item(), correct.item()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def train(name: str, way: dict[str, Any], folder: Path) -> dict[str, Any]:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    way = dict(way)
    model, precision = way.pop("model", {}), way.pop("precision", "32-true")
    options = Tp(tensor_parallel_size=2, **way)
    torch.manual_seed(5)
    task = Task(Transformer(VOCABULARY, LENGTH, dim=16, layers=2, heads=2, **model))
    data_rank, data_ranks = strategies.data_parallel(options, rank, ranks)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (STEPS, data_ranks, 3, LENGTH + 1), generator=generator)
    store = CheckpointStore(folder / name)
    writer = CheckpointWriter(store)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategies.build(options, ranks, torch.device("cpu"), 60.0),
        plugins=[TorchElasticEnvironment(), RunCheckpointIO(writer)],
        precision=precision,
        max_steps=STEPS,
        limit_val_batches=1,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(tokens[:, data_rank], batch_size=None)
    trainer.fit(task, loader, loader)
    losses = torch.stack(task.losses)
    dist.all_reduce(losses)
    path = store.path(STEPS)
    trainer.save_checkpoint(path, storage_options={"step": STEPS, "world_size": ranks})
    writer.wait()
    assert writer.take_failure() is None
    dist.barrier()
    weights = StoredCheckpoint(path).whole(MODEL)
    total = {name: value.double().norm().item() for name, value in weights.items()}
    head = dict(task.net.named_parameters())["head.weight" if not task.net.tied else "embedding.weight"]
    assert isinstance(head, DTensor)
    found = {"evaluated": task.evaluated, "head": head.to_local().numel()}
    return found | {"losses": (losses / ranks).tolist(), "lengths": sorted(task.lengths), "norms": total}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    CHUNK_BYTES["cpu"] = 4 * VOCABULARY * 8  # chunks of several positions, also of a rank's half of the vocabulary
    folder = Path(sys.argv[1])
    results = {name: train(name, way, folder) for name, way in WAYS.items()}
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
