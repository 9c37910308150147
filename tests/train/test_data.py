"""A data module, or a module's own loaders, as Lightning calls them: once, in order, with `self.trainer`; and exact
after a resume, whatever makes the loaders early, late or again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

from trainer.config.schema import TrainerOptions
from trainer.core.errors import UserError
from trainer.runtime import rng
from trainer.runtime.process import Rank
from trainer.train.data import Data

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
CALLS: list[Any] = []


class Stopped(Exception):
    pass


class Net(LightningModule):
    """Records the ids that it trains and validates on."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.save_at, self.path = save_at, path
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.tolist()))
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated += batch.tolist()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.path is not None and self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)
            raise Stopped

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Counts(Net):
    """Makes Lightning set the loaders up before it has read the checkpoint."""

    def configure_optimizers(self) -> Any:
        CALLS.append(self.trainer.estimated_stepping_batches)
        return super().configure_optimizers()


class Manual(Net):
    """Steps after 3 batches: a checkpoint lies between the optimizer steps of the plan."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        super().__init__(save_at, path)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % 3 == 0:
            self.optimizers().step()  # type: ignore[union-attr]
        return self.weight.sum()


class OwnLoaders(Net):
    """Makes its layer and its data in `setup`, and has the loaders itself."""

    def prepare_data(self) -> None:
        CALLS.append("prepare")

    def setup(self, stage: str) -> None:
        CALLS.append(f"setup {stage}")
        self.layer, self.ids = nn.Linear(1, 1), list(range(16 * self.trainer.world_size))

    def train_dataloader(self) -> Any:
        return DataLoader(self.ids, 4, shuffle=True)  # type: ignore[arg-type]


class Split(LightningDataModule):
    """Splits without a seed, and looks at its trainer."""

    def prepare_data(self) -> None:
        torch.rand(1)  # on one rank of a node only: the others must split alike
        CALLS.append("prepare")

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        CALLS.append(f"setup {stage}")
        CALLS.append((self.trainer.world_size, self.trainer.global_rank, self.trainer.lightning_module is not None))
        self.train, self.val = random_split(range(24), [16, 8])  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 2 * self.trainer.world_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 4)


class Anew(LightningDataModule):
    """Other samples in each epoch."""

    def train_dataloader(self) -> Any:
        CALLS.append("train_dataloader")
        return DataLoader(torch.randperm(1000)[:12], 2, shuffle=True)  # type: ignore[arg-type]


def made(
    module: Net, data: type | None, options: dict[str, Any] | None = None, batch_size: int | None = None
) -> tuple[Data, Trainer]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    given: dict[str, Any] = {"max_epochs": 3, **quiet, **(options or {})}
    trainer = Trainer(accelerator="cpu", devices=1, **given)
    rng.seed_all(5)
    target = None if data is None else f"{__name__}.{data.__name__}"
    config: Any = SimpleNamespace(
        data={"_target_": target, "batch_size": batch_size}, seed=5, trainer=TrainerOptions(max_epochs=3)
    )
    found = Data(config, Rank(0, 0, 1, 1, 0), trainer)
    found.set_up(module)
    return found, trainer


def fit(module: Net, data: type | None, resume: Path | None = None, **more: Any) -> Net:
    found, trainer = made(module, data, **more)
    found.steps_per_epoch()
    torch.rand(3 if resume is None else 7)  # what else draws is another in each attempt
    try:
        trainer.fit(module, datamodule=found.module, ckpt_path=resume, weights_only=True)
    except Stopped:
        pass
    return module


def test_everything_is_called_once_with_the_trainer_that_trains() -> None:
    CALLS.clear()
    module = fit(Net(), Split)
    assert CALLS == ["prepare", "setup TrainerFn.FITTING", (1, 0, True)] or CALLS == [
        "prepare",
        "setup fit",
        (1, 0, True),
    ]
    trained = {one for _, ids in module.seen for one in ids}
    assert len(trained) == 16
    assert len(module.validated) == 24
    assert trained.isdisjoint(module.validated)
    assert {one for _, ids in fit(Net(), Split).seen for one in ids} == trained


def test_the_model_draws_nothing_of_the_datas_random_numbers() -> None:
    def next_number(module: Net) -> float:
        made(module, Split)
        return float(torch.rand(1))

    rng.seed_all(5)
    assert next_number(Net()) == float(torch.rand(1, generator=torch.Generator().manual_seed(5)))


def test_each_stage_of_an_evaluation_is_set_up_once() -> None:
    CALLS.clear()
    module = Net()
    found, trainer = made(module, Split)
    trainer.validate(module, datamodule=found.module, verbose=False)
    assert [str(call).rpartition(".")[2].lower() for call in CALLS if "setup" in str(call)] == [
        "setup fit" if "fit" in str(CALLS[1]) else "fitting",
        "setup validate" if "setup validate" in CALLS else "validating",
    ]
    assert len(set(module.validated)) == 8
    # Split again by setup("validate"), and yet none of them was trained on.
    assert {one for _, ids in fit(Net(), Split).seen for one in ids}.isdisjoint(module.validated)


def test_a_modules_own_loaders(tmp_path: Path) -> None:
    CALLS.clear()
    whole = fit(OwnLoaders(), None)
    assert [str(call)[:5] for call in CALLS] == ["prepa", "setup"]
    assert len(whole.seen) == 12
    path = tmp_path / "saved.ckpt"
    before = fit(OwnLoaders(6, path), None)
    assert before.seen + fit(OwnLoaders(), None, resume=path).seen == whole.seen


def test_none_needs_a_train_dataloader() -> None:
    with pytest.raises(UserError, match="data=none: Net has no train_dataloader"):
        made(Net(), None)


@pytest.mark.parametrize("save_at", [3, 6, 8])
@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [
        (Counts, Split, {}),
        (Net, Anew, {"reload_dataloaders_every_n_epochs": 1}),
        (Counts, Anew, {"reload_dataloaders_every_n_epochs": 2}),
        (Net, Split, {"limit_train_batches": 5}),
        (Net, Split, {"accumulate_grad_batches": 3, "max_epochs": 6}),
    ],
    ids=["estimated steps", "anew", "anew every second", "limited", "accumulating"],
)
def test_a_resume_reads_on(
    kind: Callable[..., Net], data: type, options: dict[str, Any], save_at: int, tmp_path: Path
) -> None:
    whole = fit(kind(), data, options=options)
    path = tmp_path / "saved.ckpt"
    before = fit(kind(save_at, path), data, options=options)
    after = fit(kind(), data, options=options, resume=path)
    assert before.seen + after.seen == whole.seen
    assert before.seen


def test_new_loaders_are_new_in_each_epoch() -> None:
    CALLS.clear()
    seen = fit(Net(), Anew, options={"reload_dataloaders_every_n_epochs": 1}).seen
    by_epoch = [sorted(one for at, ids in seen if at == epoch for one in ids) for epoch in range(3)]
    assert len({tuple(ids) for ids in by_epoch}) == 3
    assert CALLS == ["train_dataloader"] * 3


def test_a_checkpoint_between_two_steps_of_a_manual_optimization(tmp_path: Path) -> None:
    whole = fit(Manual(), Split)
    path = tmp_path / "saved.ckpt"
    before = fit(Manual(2, path), Split)
    assert len(before.seen) == 6
    assert before.seen + fit(Manual(), Split, resume=path).seen == whole.seen
