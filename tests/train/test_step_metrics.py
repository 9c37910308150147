"""Metrics of a batch become numbers when they are read, and are then those of Lightning's own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.two_loops import Net, train
from trainer.runtime.clipping import global_norm
from trainer.train.step_metrics import BarMetrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]


class Logs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("half", loss / 2, prog_bar=True)
        return loss


class Reader(Callback):
    """Reads the metrics of the bar after every third batch, as a bar does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 2:
            self.seen.append({**trainer.progress_bar_metrics})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(dict(trainer.progress_bar_metrics.items()))
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.seen.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def test_both_loops_show_the_same_numbers() -> None:
    seen = []
    for lean in (True, False):
        reader = Reader()
        train(lean, Logs(), [reader], trace=False, max_epochs=2)
        seen.append(reader.seen)
    assert seen[0] == seen[1]
    assert all(isinstance(value, float) for one in seen[0] for value in one.values())
    assert len(seen[0]) > 4


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += "_local_scalar_dense" in func.name()
        return func(*args, **(kwargs or {}))


def test_each_way_of_reading_gives_numbers_and_reads_once() -> None:
    def bar() -> BarMetrics:
        return BarMetrics(a=torch.tensor(1.5), b=2.0)

    numbers = {"a": 1.5, "b": 2.0}
    for read in (dict, lambda one: {**one}, lambda one: dict(one.items()), BarMetrics.copy, lambda one: {} | one):
        found = read(bar())  # type: ignore[operator]
        assert (found, type(found["a"])) == (numbers, float)
    assert (bar()["a"], bar().get("a"), bar().get("c", 3), list(bar().values())) == (1.5, 1.5, 3, [1.5, 2.0])
    assert (bar() == numbers, repr(bar())) == (True, "{'a': 1.5, 'b': 2.0}")
    with Reads() as reads:
        kept = bar()
        assert reads.total == 0
        assert kept["a"] == kept["a"] == 1.5
    assert reads.total == 1


def test_the_norm_of_gradients_on_several_meshes() -> None:
    """As with tensor parallelism, where `torch.nn.utils.get_total_norm` fails."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tp"))
        sharded = DTensor.from_local(torch.tensor([3.0]), mesh["shard"], [Shard(0)])
        other = DTensor.from_local(torch.tensor([4.0]), init_device_mesh("cpu", (1,)), [Shard(0)])
        gradients: list[torch.Tensor] = [sharded, other, torch.tensor([12.0])]
        assert global_norm(gradients).item() == 13
        assert global_norm(gradients, torch.inf).item() == 12
        assert global_norm([sharded]).item() == 3
    finally:
        torch.distributed.destroy_process_group()
