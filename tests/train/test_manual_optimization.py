"""Manual optimization and accumulation by a callback, beside `data.batch_size` and `data.micro_batch`."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.nn import functional

from tests.train.two_loops import Net, loader
from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.train.manual_optimization import accumulation_by_epoch, configure

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]
PLAN = BatchPlan.of(32, 8, 1)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        self.batches += 1
        optimizer.zero_grad()
        self.manual_backward(functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    switched_off = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=list(callbacks), **switched_off, **options)


def test_the_module_sees_every_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning refuses to train at all with the number of micro-batches as its `accumulate_grad_batches`."""
    module, fits = Manual(), trainer(accumulate_grad_batches=PLAN.accumulate)
    configure(fits, module, PLAN)
    fits.fit(module, loader())
    assert module.batches == fits.global_step == 10
    assert "each micro-batch of 8 samples (4 to a global batch)" in capsys.readouterr().out


def test_automatic_optimization_keeps_its_accumulation() -> None:
    fits = trainer(accumulate_grad_batches=PLAN.accumulate)
    configure(fits, Net(), PLAN)
    fits.fit(Net(), loader())
    assert fits.global_step == 3


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "said"),
    [
        (Manual, [], {"gradient_clip_val": 0.5}, ["trainer.gradient_clip_norm=0.5", "self.clip_gradients(", "0.5"]),
        (
            Manual,
            [],
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            ["trainer.gradient_clip_val=0.5", 'gradient_clip_algorithm="value"'],
        ),
        (Manual, [GradientAccumulationScheduler({0: 2})], {}, ["GradientAccumulationScheduler", "training_step"]),
        (Net, [GradientAccumulationScheduler({0: 2})], {}, ["micro-batches", "data.batch_size=8"]),
    ],
)
def test_what_cannot_be_is_refused_in_our_own_words(module: Any, callbacks: Any, options: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        configure(trainer(*callbacks, **options), module(), PLAN)
    assert all(part in str(raised.value) for part in said)
    assert "accumulate_grad_batches" not in str(raised.value)


def test_steps_of_an_epoch_by_the_callback() -> None:
    assert accumulation_by_epoch([Callback(), GradientAccumulationScheduler({0: 2, 2: 4})], 4) == [2, 2, 4, 4]
    assert accumulation_by_epoch([Callback()], 2) == [1, 1]
