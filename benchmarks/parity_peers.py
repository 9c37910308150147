"""The other frameworks of `benchmarks/parity`: Lightning, Fabric, Accelerate, Hugging Face's Trainer.

Each as in its own first example, with the options that spare it work: no bar, no checkpoints, no clipping.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from parity_data import CASES, Batch, Stream, batches_of
from parity_turns import Pace
from torch import Tensor, nn
from torch.nn import functional

from trainer.config.instantiate import instantiate
from trainer.runtime import rng
from trainer.runtime.process import Rank

SEED = 0
LEARNING_RATE = 1e-3
BUCKETS = {"gradient_as_bucket_view": True, "find_unused_parameters": False}
"""Our default of DDP, so given to the others, too."""

Trained = tuple[nn.Module, dict[int, float]]
"""The model, and the loss after each logged step."""

APART = Path(sys.prefix) / "transformers"
"""Where `./launch/test` puts transformers and accelerate: torchmetrics would import them with Lightning."""


def load() -> None:
    """Import what is not imported yet, so that all variants are forked from a process that has imported the same."""
    if find_spec("transformers") is None:
        sys.path.append(str(APART))
    import accelerate  # noqa: F401
    from transformers import Trainer as _  # noqa: F401


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of (n, classes), or of (n, length, vocabulary) for each next token."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def model_of(name: str) -> nn.Module:
    """The model with the weights that all variants begin with."""
    rng.seed_all(SEED)
    return instantiate(CASES[name].model)  # type: ignore[no-any-return]


class Plain(LightningModule):
    """As in Lightning's own first example."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = loss_of(self.model(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


def lightning(name: str, steps: int, rank: Rank, pace: Pace, folder: Path) -> Trained:
    """Lightning's Trainer with its CSV logger."""
    stream = Stream(batches_of(name, rank.rank), pace, steps)
    model = model_of(name)
    trainer = Trainer(
        accelerator="cpu",
        devices=rank.world_size,
        strategy="auto" if rank.world_size == 1 else DDPStrategy(process_group_backend="gloo", **BUCKETS),
        max_steps=steps,
        log_every_n_steps=CASES[name].log_every,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Plain(model), stream)
    return model, {}


def fabric(name: str, steps: int, rank: Rank, pace: Pace, folder: Path) -> Trained:
    """A loop of one's own over Lightning's Fabric, which logs nothing by itself."""
    options: Any = {"process_group_backend": "gloo", **BUCKETS}
    fabric = Fabric(
        accelerator="cpu",
        devices=rank.world_size,
        strategy="auto" if rank.world_size == 1 else FabricDDPStrategy(**options),
    )
    fabric.launch()
    model = model_of(name)
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    losses: dict[int, float] = {}
    for step, (inputs, targets) in enumerate(Stream(batches_of(name, rank.rank), pace, steps), 1):
        optimizer.zero_grad()
        loss = loss_of(wrapped(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        if step % CASES[name].log_every == 0:
            losses[step] = loss.item()
    return model, losses


def accelerate(name: str, steps: int, rank: Rank, pace: Pace, folder: Path) -> Trained:
    """A loop of one's own over Accelerate, which logs nothing by itself."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**BUCKETS)])
    assert accelerator.num_processes == rank.world_size
    model = model_of(name)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    losses: dict[int, float] = {}
    for step, (inputs, targets) in enumerate(Stream(batches_of(name, rank.rank), pace, steps), 1):
        optimizer.zero_grad()
        loss = loss_of(wrapped(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        if step % CASES[name].log_every == 0:
            losses[step] = loss.item()
    return model, losses


class _Named:
    """The stream as Hugging Face's Trainer takes it: batches that name the arguments of the model."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batch: Batch
        for batch in self._stream:
            yield {"inputs": batch[0], "targets": batch[1]}


def hugging_face(name: str, steps: int, rank: Rank, pace: Pace, folder: Path) -> Trained:
    """Hugging Face's Trainer, which logs to its own state; its loss is that of the other variants."""
    import transformers

    stream = Stream(batches_of(name, rank.rank), pace, steps)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = model_of(name)

    class Own(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return _Named(stream)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            return loss_of(model(inputs["inputs"]), inputs["targets"])

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=CASES[name].batch_size,
        logging_steps=CASES[name].log_every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
        ddp_backend="gloo" if rank.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        seed=SEED,
    )
    Own(model=model, args=options, train_dataset=stream, optimizers=(optimizer, schedule)).train()
    return model, {}
