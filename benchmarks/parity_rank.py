"""One rank of `benchmarks/parity`, started by torchrun: trains the variants in turn and writes what each step cost."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from parity_data import CASES, LOG_EVERY, Clock, Stream, batches_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from trainer.config.build import instantiate
from trainer.config.schema import Config
from trainer.config.typed import to_config
from trainer.runs.directory import RunDirectory
from trainer.worker import rng, run
from trainer.worker.heartbeat import Heartbeat
from trainer.worker.process import Rank

SEED = 0
LEARNING_RATE = 1e-3
BUCKETS = {"gradient_as_bucket_view": True, "find_unused_parameters": False}
"""Our default of DDP, so given to the others, too."""

Trained = tuple[nn.Module, dict[int, float]]
"""The model, and the loss after each logged step."""


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of (n, classes), or of (n, length, vocabulary) for each next token."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def bare(name: str, steps: int, rank: Rank, folder: Path, group: Any) -> Trained:
    """What one would write by hand, reading the loss on the same steps."""
    stream = Stream(batches_of(name, rank.rank), steps)
    rng.seed_all(SEED)
    model = instantiate(CASES[name].model)
    wrapped = model if rank.world_size == 1 else DistributedDataParallel(model, **BUCKETS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = {}
    for step, (inputs, targets) in enumerate(stream, start=1):
        optimizer.zero_grad()
        loss = loss_of(wrapped(inputs), targets)
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY == 0:
            losses[step] = loss.item()
    return model, losses


def ours(name: str, steps: int, rank: Rank, folder: Path, group: Any) -> Trained:
    """A run as `trainer fit` trains it: every callback, metrics.jsonl, the heartbeat."""
    directory = RunDirectory(folder)
    for path in (directory.live_dir, directory.attempts_dir, directory.checkpoints_dir, directory.stop_request.parent):
        path.mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat(directory.live_dir / f"rank-{rank.rank}.json", rank)
    heartbeat.start()
    kept: list[nn.Module] = []
    build_module = run.build.build_module

    def keeping(*arguments: Any) -> LightningModule:
        module = build_module(*arguments)
        kept.append(module.model)  # type: ignore[arg-type]
        return module

    run.build.build_module = keeping
    try:
        run._train(config_of(name, steps, rank, folder), run.Attempt(directory, rank, heartbeat), group)
    finally:
        run.build.build_module = build_module
        heartbeat.stop("finished")
    losses = {}
    if rank.is_first:
        lines = map(json.loads, directory.metrics_path.read_text().splitlines())
        losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    return kept[0], losses


def config_of(name: str, steps: int, rank: Rank, folder: Path) -> Config:
    case = CASES[name]
    return to_config(
        {
            "name": "parity",
            "seed": SEED,
            "runs_dir": str(folder.parent),
            "resources": {"gpus": 0, "cpu_processes": rank.world_size},
            "trainer": {"max_steps": steps, "precision": "32-true", "log_every_n_steps": LOG_EVERY},
            "tracking": {"name": "none"},
            "strategy": {"name": "ddp"},
            "cluster": {"name": "local"},
            "model": case.model,
            "data": {
                "_target_": "parity_data.Batches",
                "case": name,
                "steps": steps,
                "batch_size": case.batch_size * rank.world_size,
            },
            "task": {"_target_": case.task},
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": LEARNING_RATE},
            "scheduler": {"_target_": None},
            "callbacks": {},
        }
    )


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


def lightning(name: str, steps: int, rank: Rank, folder: Path, group: Any) -> Trained:
    """Lightning's Trainer with its CSV logger; no bar, no checkpoints, which would only make it slower."""
    stream = Stream(batches_of(name, rank.rank), steps)
    rng.seed_all(SEED)
    model = instantiate(CASES[name].model)
    trainer = Trainer(
        accelerator="cpu",
        devices=rank.world_size,
        strategy="auto" if rank.world_size == 1 else DDPStrategy(process_group_backend="gloo", **BUCKETS),
        max_steps=steps,
        log_every_n_steps=LOG_EVERY,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Plain(model), stream)
    return model, {}


VARIANTS: dict[str, Callable[..., Trained]] = {"bare": bare, "ours": ours, "lightning": lightning}


def fingerprint(model: nn.Module) -> str:
    """Of the weights' bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def measure(name: str, rounds: int, steps: int, folder: Path, rank: Rank) -> dict[str, Any]:
    """Every variant once a round, in reversed order each other round. The first round warms up and is dropped."""
    group = run.init_process_group(config_of(name, steps, rank, folder), rank)
    costs: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    prints: set[str] = set()
    losses: dict[str, dict[int, float]] = {}
    for number in range(rounds + 1):
        order = list(VARIANTS)[:: -1 if number % 2 else 1]
        for variant in order:
            gc.collect()
            if group is not None:
                distributed.barrier(group)
            with contextlib.redirect_stdout(io.StringIO()):
                model, logged = VARIANTS[variant](
                    name, WARM_STEPS if number == 0 else steps, rank, folder / f"{number}-{variant}", group
                )
            if number == 0:
                continue
            costs[variant].append(_mean_over_ranks(Clock.measured_us(), group))
            prints.add(fingerprint(model))
            losses[variant] = _loss_over_ranks(logged, group) if variant == "bare" else logged
    assert len(prints) == 1, "the variants ended with different weights"
    if rank.is_first:
        _assert_equal(losses["bare"], losses["ours"])
    return {"costs": costs, "weights": prints.pop(), "losses": losses["bare"]}


WARM_STEPS = 12


def _mean_over_ranks(values: tuple[float, float], group: Any) -> list[float]:
    means = torch.tensor(values, dtype=torch.float64)
    if group is not None:
        distributed.all_reduce(means, group=group)
        means /= distributed.get_world_size(group)
    return means.tolist()


def _loss_over_ranks(losses: dict[int, float], group: Any) -> dict[int, float]:
    if group is None:
        return losses
    means = torch.tensor(list(losses.values()), dtype=torch.float64)
    distributed.all_reduce(means, group=group)
    means /= distributed.get_world_size(group)
    return dict(zip(losses, means.tolist(), strict=True))


def _assert_equal(bare_losses: dict[int, float], our_losses: dict[int, float]) -> None:
    assert bare_losses, "no loss was read"
    assert bare_losses == our_losses, f"losses differ: {bare_losses} and {our_losses}"


def main() -> None:
    name, rounds, steps, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    run.silence_known_warnings()
    rank = Rank.from_environment()
    found = measure(name, rounds, steps, folder, rank)
    if rank.is_first:
        (folder / "found.json").write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
