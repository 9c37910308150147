"""The guard learns each step's whole loss, whichever loop notes it: ours, Lightning's, or one after the other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from tests.train.two_loops import Net, train
from trainer.callbacks.guard import Guard
from trainer.config.schema import ResilienceOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]

STEPS = 5


class Saves(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def losses(lean: bool, *callbacks: Callback, **options: Any) -> list[float]:
    """Those of each step that spikes are looked for in."""
    no_events: Any = SimpleNamespace(events_of=lambda kind: [])
    guard = Guard(ResilienceOptions(spike_z=1e9), no_events, 0, None)
    train(lean, Net(), [guard, *callbacks], trace=False, max_steps=STEPS, max_epochs=-1, **options)
    return list(guard.state_dict()["losses"])


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_of_either_loop_and_after_a_resume_in_mid_epoch(tmp_path: Path, accumulate: int) -> None:
    unharmed = losses(True, Saves(tmp_path / "step-2.ckpt"), accumulate_grad_batches=accumulate)
    assert len(unharmed) == STEPS
    assert losses(False, accumulate_grad_batches=accumulate) == unharmed
    checkpoint = str(tmp_path / "step-2.ckpt")
    resumed = [losses(lean, checkpoint=checkpoint, accumulate_grad_batches=accumulate) for lean in (True, False)]
    # Not as unharmed: this loader begins again, and nobody restores the dropout's state.
    assert resumed[0] == resumed[1]
    assert (len(resumed[0]), resumed[0][:2]) == (STEPS, unharmed[:2])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_gradient_scaler_does_not_make_them_larger_in_either_loop(accumulate: int) -> None:
    def scaled(lean: bool) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        return losses(lean, plugins=[precision], accumulate_grad_batches=accumulate)

    found = scaled(True)
    assert len(found) == STEPS
    assert 0 < max(found) < 40
    assert scaled(False) == found


def test_losses_on_another_device_than_offloaded_gradients() -> None:
    """As with cpu_offload on a GPU. The meta device refuses to be mixed with the CPU, too."""
    guard = Guard(ResilienceOptions(spike_z=1e9), cast(Any, SimpleNamespace()), 0, None)
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    value = guard._value(torch.optim.SGD([parameter], lr=1.0), [torch.ones((), device="meta")] * 2)
    assert (value.device.type, value.shape) == ("meta", (2,))
