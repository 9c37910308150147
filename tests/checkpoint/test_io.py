"""Lightning's side of checkpoints: plain content, background saves, loud failures."""

from __future__ import annotations

import functools
import threading
from enum import Enum
from pathlib import Path

import numpy
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from trainer.checkpoint import commit
from trainer.checkpoint import io as checkpoint_io
from trainer.checkpoint.commit import CommitInfo, SaveFailed
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO, load_state
from trainer.checkpoint.store import Checkpoint, CheckpointStore
from trainer.core.errors import UserError

BOUND_S = 300.0


class Colour(Enum):
    RED = "red"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, state: dict[str, object], asynchronous: bool = False) -> dict[str, object]:
    writer = CheckpointWriter(store, asynchronous)
    io = RunCheckpointIO(writer)
    io.save_checkpoint(state, store.path(1), {"step": 1})
    io.teardown()
    writer.raise_if_failed()
    return io.load_checkpoint(store.path(1))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_comes_back(store: CheckpointStore, asynchronous: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "empty": torch.empty(0),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "transposed": torch.arange(6).view(2, 3).t(),
        "types": [1, 2.5, "text", b"bytes", None, True, (1, 2), {3}, torch.Size([1]), torch.float32, 1j],
    }
    loaded = save(store, state, asynchronous)
    assert loaded["types"] == state.pop("types")
    loaded_groups = loaded["optimizer_states"][0].pop("param_groups")  # type: ignore[index]
    assert loaded_groups == state["optimizer_states"][0].pop("param_groups")  # type: ignore[index]
    loaded.pop("types")
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert loaded["state_dict"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]


def test_hydra_and_numpy_values_become_plain(store: CheckpointStore) -> None:
    node = OmegaConf.create({"width": 8, "twice": "${width}"})
    state = {
        "hyper_parameters": {
            "config": node,
            "path": Path("data/set"),
            "rate": numpy.float64(0.5),
            "count": numpy.int64(3),
            "colour": Colour.RED,
            "factory": functools.partial(int, base=2),
            "model": nn.Linear(1, 1),
        },
        "hparams_type": type(node),
        "callbacks": {"mine": {"best": numpy.float32(0.25), numpy.int64(4): [Path("x")]}},
    }
    loaded = save(store, state)
    assert loaded == {
        "hyper_parameters": {
            "config": {"width": 8, "twice": 8},
            "path": "data/set",
            "rate": 0.5,
            "count": 3,
            "colour": "red",
        },
        "callbacks": {"mine": {"best": 0.25, 4: ["x"]}},
    }


@pytest.mark.parametrize("value", [functools.partial(int), numpy.zeros(2), object(), int])
def test_what_could_not_be_loaded_is_refused_at_the_save(store: CheckpointStore, value: object) -> None:
    with pytest.raises(UserError, match=r"callbacks\.Mine\.0 is a"):
        save(store, {"callbacks": {"Mine": [value]}})
    assert store.committed() == []


def test_tied_tensors_stay_one_and_buffers_are_reused(store: CheckpointStore) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    writer = CheckpointWriter(store, asynchronous=True)
    for step in (1, 2):
        writer.save({"state_dict": model.state_dict()}, store.path(step), CommitInfo(step=step))
        writer.wait()
        writer.raise_if_failed()
        addresses = [buffer.data_ptr() for buffer in writer._buffers._buffers.values()]
        if step == 1:
            first = addresses
    assert addresses == first
    assert len(first) == 1
    assert store.committed()[0].bytes < 64 * 64 * 4 * 1.5
    loaded = load_state(store.path(2))["state_dict"]
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()


class Gate:
    """Stands in for a slow disk: writing waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.most, self._inside = 0, 0
        original = checkpoint_io.write_state

        def slow(staging: commit.Staging, state: dict[str, object]) -> None:
            self._inside += 1
            self.most = max(self.most, self._inside)
            assert self.open.wait(BOUND_S)
            original(staging, state)
            self._inside -= 1

        monkeypatch.setattr(checkpoint_io, "write_state", slow)


def test_training_goes_on_during_a_save_and_does_not_change_it(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    seen: list[Checkpoint] = []
    writer = CheckpointWriter(store, asynchronous=True, on_committed=seen.append)
    weight = torch.zeros(1000)
    writer.save({"weight": weight}, store.path(1), CommitInfo(step=1))
    assert writer.in_flight
    weight.fill_(7)
    assert store.committed() == []
    gate.open.set()
    writer.save({"weight": weight}, store.path(2), CommitInfo(step=2))
    writer.wait()
    writer.raise_if_failed()
    assert gate.most == 1, "two saves were in flight"
    assert [checkpoint.step for checkpoint in seen] == [1, 2]
    assert load_state(store.path(1))["weight"].sum() == 0
    assert load_state(store.path(2))["weight"].sum() == 7000


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_is_loud_and_the_next_one_may_work(
    store: CheckpointStore, asynchronous: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(staging: commit.Staging, state: dict[str, object]) -> None:
        raise OSError(30, "Read-only file system")

    writer = CheckpointWriter(store, asynchronous)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_io, "write_state", broken)
        writer.save({"a": torch.ones(1)}, store.path(1), CommitInfo(step=1))
        writer.wait()
    assert "step-00000001 failed" in caplog.text
    with pytest.raises(SaveFailed, match="read-only"):
        writer.raise_if_failed()
    writer.raise_if_failed()
    writer.save({"a": torch.ones(1)}, store.path(2), CommitInfo(step=2))
    writer.wait()
    assert writer.take_failure() is None
    assert [checkpoint.step for checkpoint in store.committed()] == [2]


def test_an_error_in_the_commit_callback_is_not_lost(store: CheckpointStore) -> None:
    def broken(checkpoint: Checkpoint) -> None:
        raise RuntimeError("callback")

    writer = CheckpointWriter(store, asynchronous=True, on_committed=broken)
    writer.save({"a": 1}, store.path(1), CommitInfo(step=1))
    writer.wait()
    assert isinstance(writer.take_failure(), RuntimeError)
    assert len(store.committed()) == 1


def test_loading_says_what_is_missing(store: CheckpointStore) -> None:
    with pytest.raises(UserError, match="not a complete checkpoint"):
        RunCheckpointIO(CheckpointWriter(store)).load_checkpoint(store.path(3))


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"x": functools.partial(print, "run")}, path)
    with pytest.raises(Exception, match="code and not data"):
        load_state(path)


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"folder": Path("x")})
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.arange(32.0).view(8, 4), batch_size=2)


@pytest.mark.filterwarnings(
    "ignore:.*num_workers.*", "ignore:.*save_hyperparameters.*", "ignore:.*srun.*", "ignore:.*LeafSpec.*"
)
def test_through_lightnings_trainer_and_back(store: CheckpointStore, tmp_path: Path) -> None:
    def trainer(max_steps: int) -> tuple[Trainer, CheckpointWriter]:
        writer = CheckpointWriter(store, asynchronous=True)
        built = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            plugins=[RunCheckpointIO(writer), LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        return built, writer

    module = Tiny()
    first, writer = trainer(4)
    first.fit(module)
    first.save_checkpoint(store.path(4), storage_options={"step": 4, "epoch": 1, "metrics": {"train/loss": 1.0}})
    writer.wait()
    writer.raise_if_failed()
    found = store.committed()[0]
    assert (found.step, found.metrics) == (4, {"train/loss": 1.0})
    second, _ = trainer(8)
    again = Tiny()
    second.fit(again, ckpt_path=str(store.path(4)), weights_only=True)
    assert second.global_step == 8
    # A user's own call is the file that Lightning writes, for Lightning to load.
    made = tmp_path / "hand" / "made.ckpt"
    first.save_checkpoint(made)
    assert torch.load(made, weights_only=False)["global_step"] == 4
    loaded = Tiny.load_from_checkpoint(made, weights_only=False)
    assert all(one.equal(two) for one, two in zip(loaded.parameters(), module.parameters(), strict=True))
    with pytest.raises(TypeError, match="storage_options"):
        first.save_checkpoint(tmp_path / "no.ckpt", storage_options={"theirs": 1})
