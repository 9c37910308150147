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


class Stopped(Exception):
    pass


class Net(LightningModule):
    def __init__(self, save_at: int | None, folder: Path) -> None:
        super().__init__()
        self.save_at, self.folder = save_at, folder
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, ids_of(batch)))
        return self.weight.sum() * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.folder / "saved.ckpt")
            raise Stopped


def config_of(kind: str) -> Any:
    data = {"_target_": "tests.data.kinds.Data", "kind": kind, "batch_size": None}
    return SimpleNamespace(data=data, seed=3, trainer=TrainerOptions())


def train(kind: str, place: Rank, group: Any, folder: Path, save_at: int | None = None, resume: bool = False) -> Net:
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
    module = Net(save_at, folder)
    data.set_up(module)
    data.steps_per_epoch()
    rng.seed_all(rng.seed_of_rank(int(resume), place.rank))
    try:
        trainer.fit(
            module, datamodule=data.module, ckpt_path=folder / "saved.ckpt" if resume else None, weights_only=True
        )
    except Stopped:
        pass
    return module


def check(kind: str, place: Rank, group: Any, folder: Path) -> None:
    whole = train(kind, place, group, folder)
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
        before = train(kind, place, group, folder, save_at=save_at).seen
        distributed.barrier()
        after = train(kind, place, group, folder, resume=True).seen
        distributed.barrier()
        joined = [ids for _, ids in [*before, *after]]
        wanted_ids = [ids for _, ids in whole.seen]
        assert joined == wanted_ids, f"resumed after {save_at}:\n{before}\n+ {after}\nnot\n{whole.seen}"


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
