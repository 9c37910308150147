"""The variants of `benchmarks/parity`: a bare loop, ours, and the peers (`parity_peers.py`).

Each trains one rank, at the pace it is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import parity_peers
import torch
import torch.distributed as distributed
from lightning.pytorch import LightningModule
from parity_data import CASES, Batch, Batches, Stream, batches_of
from parity_peers import BUCKETS, LEARNING_RATE, SEED, Trained, loss_of, model_of
from parity_turns import Alone, Pace
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.instantiate import freeze
from trainer.config.schema import Config
from trainer.config.typed import to_config
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.train import run


class Bare:
    """What one would write by hand, reading the loss on the same steps."""

    def __init__(self, name: str, rank: Rank) -> None:
        self.model = model_of(name)
        self._wrapped = self.model if rank.world_size == 1 else DistributedDataParallel(self.model, **BUCKETS)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self._log_every = CASES[name].log_every
        self._batches = cycle(batches_of(name, rank.rank))
        self.losses: dict[int, float] = {}
        self._step = 0

    def train(self, steps: int) -> None:
        self.train_on(islice(self._batches, steps))

    def train_on(self, batches: Iterable[Batch]) -> None:
        for inputs, targets in batches:
            self._step += 1
            self._optimizer.zero_grad()
            loss = loss_of(self._wrapped(inputs), targets)
            loss.backward()
            self._optimizer.step()
            if self._step % self._log_every == 0:
                self.losses[self._step] = loss.item()


def bare(name: str, steps: int, rank: Rank, pace: Pace, folder: Path) -> Trained:
    """The bare loop beside itself: what its ratio misses 1 by is what the measurement cannot tell."""
    if rank.world_size > 1:
        distributed.init_process_group("gloo")
    one = Bare(name, rank)
    one.train_on(Stream(batches_of(name, rank.rank), pace, steps))
    return one.model, one.losses


def ours(name: str, steps: int, rank: Rank, pace: Pace, folder: Path) -> Trained:
    """A run as `trainer fit` trains it: every callback, metrics.jsonl, the heartbeat."""
    directory = RunDirectory(folder)
    for path in (directory.live_dir, directory.attempts_dir, directory.checkpoints_dir, directory.stop_request.parent):
        path.mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat(directory, rank)
    heartbeat.start()
    Batches.pace = pace
    kept: list[nn.Module] = []
    build_module = run.build.build_module

    def keeping(*arguments: Any, **options: Any) -> LightningModule:
        module = build_module(*arguments, **options)
        kept.append(module.model)  # type: ignore[arg-type]
        return module

    run.build.build_module = keeping
    config = config_of(name, steps, rank, folder)
    write_atomic(directory.config_path, freeze(asdict(config)))
    attempt = run.Attempt(directory, rank, heartbeat)
    run.train(config, attempt, run.init_process_group(config, rank), run.StartClock(attempt))
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
            "trainer": {"max_steps": steps, "precision": "32-true", "log_every_n_steps": CASES[name].log_every},
            "tracking": {"name": "none"},
            # A turn of the twin is no time of this run: by its clock the ranks would agree twice as often as they do.
            "resilience": {"agree_every_s": 2.0},
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


VARIANTS: dict[str, Callable[..., Trained]] = {
    "bare": bare,
    "ours": ours,
    "fabric": parity_peers.fabric,
    "accelerate": parity_peers.accelerate,
    "huggingface": parity_peers.hugging_face,
    "lightning": parity_peers.lightning,
}


def fingerprint(model: nn.Module) -> str:
    """Of the weights' bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Ended:
    """What one rank of a variant has come to, and its twin."""

    weights: set[str]
    """Fingerprints: one where both are equal."""
    losses: dict[int, float]
    twin_losses: dict[int, float]


def train(variant: str, name: str, pace: Pace, folder: Path) -> Ended:
    """In the process of one rank."""
    torch.set_num_threads(1)
    rank, twins = Rank.from_environment(), []

    def make_twin() -> Bare:
        with torch.random.fork_rng():
            twins.append(Bare(name, rank))
        return twins[0]

    pace.make_twin = make_twin
    model, losses = VARIANTS[variant](name, pace.blocks.steps, rank, pace, folder)
    return Ended({fingerprint(model), fingerprint(twins[0].model)}, losses, twins[0].losses)


def train_alone(variant: str, name: str, pace: Alone, folder: Path) -> None:
    """In the process of one rank, without a twin."""
    torch.set_num_threads(1)
    VARIANTS[variant](name, pace.steps, Rank.from_environment(), pace, folder)
