"""Keys under which callbacks and loops are stored in checkpoints: those of earlier versions must still load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trainer.callbacks.accumulation import Accumulation
from trainer.callbacks.best import BestMetric
from trainer.callbacks.boundary import Boundary, BoundaryOptions
from trainer.callbacks.early_stopping import LossEarlyStopping
from trainer.callbacks.guard import Guard
from trainer.callbacks.rng import RngState
from trainer.callbacks.transient_state import TransientState
from trainer.config.schema import CheckpointOptions, ResilienceOptions
from trainer.train.save_points import BETWEEN_BATCHES, BETWEEN_EPOCHS, SAVE_POINT_KEY


def test_callbacks_keep_their_keys() -> None:
    anything: Any = SimpleNamespace()
    limits = BoundaryOptions(CheckpointOptions(), ResilienceOptions(), anything)
    callbacks = [
        Accumulation(1),
        BestMetric(CheckpointOptions(), None, anything, anything, None),
        Boundary(anything, limits, None),
        Guard(ResilienceOptions(), anything, 0, None),
        TransientState(0, None),
        LossEarlyStopping("stop", mode="min"),
        RngState(0, 0, 0, None),
    ]
    assert [callback.state_key for callback in callbacks] == [
        "Accumulation",
        "BestMetric",
        "Boundary",
        "Guard",
        "InMemory",
        "StopsByLoss{'monitor': None, 'mode': 'min'}",
        "RngState",
    ]


def test_save_points_keep_their_names() -> None:
    assert (SAVE_POINT_KEY, BETWEEN_BATCHES, BETWEEN_EPOCHS) == ("moment", "batch", "epoch")
