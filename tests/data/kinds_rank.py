"""One of two ranks that train with loaders of every kind, whole and after a resume, and compare who read what."""

from __future__ import annotations

import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import distributed, nn

from tests.data.kinds import KINDS, ids_of
from trainer.config.schema import TrainerOptions
from trainer.runtime import rng
from trainer.runtime.process import Rank
from trainer.train.data import Data
from trainer.train.loop import use_lean_loop

EPOCHS = 3


class Net(LightningModule):
    """Notes what it reads, and saves after every step until the third of the second epoch if it has a folder to."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, ids_of(batch)))
        return self.weight.sum() * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        of_second_epoch = sum(epoch > 0 for epoch, _ in self.seen)
        if self.folder is not None and of_second_epoch < 3:
            self.trainer.save_checkpoint(self.folder / f"saved-{self.global_step}.ckpt")


def config_of(kind: str) -> Any:
    data = {"_target_": "tests.data.kinds.Data", "kind": kind, "batch_size": None}
    return SimpleNamespace(data=data, seed=3, trainer=TrainerOptions())


def train(kind: str, place: Rank, group: Any, save_in: Path | None = None, resume: Path | None = None) -> Net:
    trainer = Trainer(
        accelerator="cpu",
        devices=place.world_size,
        strategy="ddp",
        plugins=[TorchElasticEnvironment()],
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    use_lean_loop(trainer)
    rng.seed_all(3)
    data = Data(config_of(kind), place, trainer, group)
    module = Net(save_in)
    data.set_up(module)
    data.steps_per_epoch()
    rng.seed_all(rng.seed_of_rank(int(resume is not None), place.rank))
    trainer.fit(module, datamodule=data.module, ckpt_path=resume, weights_only=True)
    return module


def check(kind: str, place: Rank, group: Any, folder: Path) -> None:
    whole = train(kind, place, group, save_in=folder)
    steps = len(whole.seen)
    everyone: list[Any] = [None] * place.world_size
    distributed.all_gather_object(everyone, whole.seen, group=group)
    assert len({len(one) for one in everyone}) == 1, f"{[len(one) for one in everyone]} batches on the ranks"
    expected = KINDS[kind].ids
    for epoch in range(EPOCHS):
        read = sorted(one for seen in everyone for at, ids in seen if at == epoch for one in ids)
        if expected is None or expected:
            wanted = sorted(expected or range(48))
            wrong = Counter(read) - Counter(wanted), Counter(wanted) - Counter(read)
            assert read == wanted, f"epoch {epoch}: too often {wrong[0]}, missing {wrong[1]}"
        per_rank = [[ids for at, ids in seen if at == epoch] for seen in everyone]
        for first, second in zip(*per_rank, strict=True):
            assert first != second or kind in ("with replacement", "weighted"), f"both ranks read {first}"
    per_epoch = steps // EPOCHS
    for save_at in (1, per_epoch, per_epoch + 2):
        after = train(kind, place, group, resume=folder / f"saved-{save_at}.ckpt").seen
        expected_after = whole.seen[save_at:]
        assert [ids for _, ids in after] == [ids for _, ids in expected_after], (
            f"resumed after {save_at}:\n{after}\nnot\n{expected_after}"
        )


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    place = Rank(distributed.get_rank(), distributed.get_rank(), 2, 2, 0)
    group = distributed.new_group(backend="gloo")
    failed = 0
    for kind in sys.argv[2:] or KINDS:
        began = time.monotonic()
        try:
            check(kind, place, group, Path(sys.argv[1]))
            print(f"ok {kind} {time.monotonic() - began:.1f}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {kind}", traceback.format_exc()[-3000:], flush=True)
            distributed.barrier()
    print(f"{failed} failed", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
