"""What the ranks of `trainer evaluate` and of `trainer predict` have in common: their process, and a job to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed
from lightning.pytorch import LightningModule, Trainer

from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import Config
from trainer.runs.directory import RunDirectory
from trainer.runtime import hydra_state, logs, rng
from trainer.runtime.process import Rank, die_with_parent
from trainer.runtime.torch_setup import init_process_group, silence_known_warnings
from trainer.train import build
from trainer.train.data import Data


@contextmanager
def process_of(run: RunDirectory) -> Iterator[Rank]:
    """Prepare this process as a rank for a run, and leave the process group at the end."""
    die_with_parent()
    silence_known_warnings()
    logs.start(run.config())
    yield Rank.from_environment()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Job:
    """A module with its data, which no Trainer has run yet."""

    config: Config
    rank: Rank
    trainer: Trainer
    data: Data
    module: LightningModule


def build_job(run: RunDirectory, data_node: dict[str, Any] | None = None) -> Job:
    """Join the process group, and build the Trainer, the data and the module of a run. Collective.

    Args:
        run: The run.
        data_node: The section `data` to use instead of the run's.
    """
    config, rank = hydra_state.load(run), Rank.from_environment()
    if data_node is not None:
        config.data = data_node
    group = init_process_group(config, rank)
    store = CheckpointStore(run.checkpoints_dir)
    trainer = build.build_trainer(config, rank, RunCheckpointIO(CheckpointWriter(store)), str(run.path))
    rng.seed_all(config.seed)
    data = build.build_data(config, rank, trainer, group)
    module = build.build_module(config, data, lambda: None, deferral=build.deferral_of(config, rank))
    data.set_up(module)
    return Job(config, rank, trainer, data, module)
