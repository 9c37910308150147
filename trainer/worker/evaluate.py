"""One rank of an evaluation of a run's checkpoint: `worker/start.py evaluate RUN_DIR FOLDER SPLIT`.

Reads the run directory and writes nothing into it but `evaluations/step-N-SPLIT.json`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed

from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore, step_of
from trainer.runs.directory import RunDirectory
from trainer.runs.files import write_atomic
from trainer.worker import build, hydra_state, rng
from trainer.worker.process import Rank, die_with_parent
from trainer.worker.torch_setup import init_process_group, silence_known_warnings


def main() -> int:
    run, folder_name, split = RunDirectory(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
    checkpoint = run.checkpoints_dir / folder_name
    step = step_of(checkpoint)
    die_with_parent()
    silence_known_warnings()
    metrics = evaluate(run, checkpoint, split)
    rank = Rank.from_environment()
    if rank.is_first:
        record = {"step": step, "split": split, "metrics": metrics, "world_size": rank.world_size, "time": time.time()}
        folder = run.path / "evaluations"
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"step-{step:08d}-{split}.json", json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def evaluate(run: RunDirectory, checkpoint: Path, split: str) -> dict[str, float]:
    """The metrics of `split` (val or test), each sample counted once over all ranks."""
    config, rank = hydra_state.load(run), Rank.from_environment()
    group = init_process_group(config, rank)
    store = CheckpointStore(run.checkpoints_dir)
    trainer = build.build_trainer(config, rank, RunCheckpointIO(CheckpointWriter(store)), str(run.path))
    rng.seed_all(config.seed)
    data = build.build_data(config, rank, trainer, group)
    module = build.build_module(config, data, lambda: None, defer=build.defers(config, rank))
    data.set_up(module)
    method = trainer.test if split == "test" else trainer.validate
    (found,) = method(module, datamodule=data.module, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    return {name: float(value) for name, value in found.items()}
