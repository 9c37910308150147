"""End of a training, for every strategy: nothing is copied, and a failed rank leaves NCCL at once."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parallel import DistributedDataParallel

from trainer.runtime.abort import abort_nccl
from trainer.runtime.stop import StopTraining

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as _Base
else:
    _Base = ABC


KNOWN_PACKAGES = ("lightning.", "pytorch_lightning.", "trainer.")
"""Packages whose callbacks do not use the model after the training."""


class EndsInPlace(_Base):
    """Mixin for a strategy that leaves model and optimizers on their device when it is torn down.

    Lightning copies both to the host, for code that uses them after `Trainer.fit`. Here the process ends then, and the
    copy would need host memory for the whole state, beside the snapshot that the checkpoint writer may still be
    writing. Only for an `on_fit_end` of the user, which may export the model or call it, the model is moved, without
    optimizers, once the writer has finished. `teardown` hooks find the model on the device (with `sync_batchnorm` also
    its SyncBatchNorm).
    """

    def teardown(self) -> None:
        """Wait for the checkpoint writer, then tear down as Lightning does, without model and optimizers."""
        self.checkpoint_io.teardown()
        module, model, optimizers = self.lightning_module, self.model, self.optimizers
        nothing: Any = None
        self.connect(nothing)
        self.optimizers = []
        try:
            super().teardown()
        finally:
            if module is not None:
                self.connect(module)
            if not isinstance(model, DistributedDataParallel):  # Lightning unwraps that
                self.model = model
            self.optimizers = optimizers
        if module is not None and _ends_with_own_code(module):
            module.cpu()

    def on_exception(self, exception: BaseException) -> None:
        """Abort NCCL, so that neither the teardown nor the exit waits for collectives that other ranks never join."""
        if not isinstance(exception, StopTraining):  # all ranks stop together, after the same collectives
            abort_nccl()
        super().on_exception(exception)


def _ends_with_own_code(module: LightningModule) -> bool:
    """Return whether a hook `on_fit_end` of the user follows; none does after an exception."""
    trainer = module._trainer
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.interrupted:
        return False
    callbacks = [one for one in trainer.callbacks if not type(one).__module__.startswith(KNOWN_PACKAGES)]  # type: ignore[attr-defined]
    return is_overridden("on_fit_end", module, LightningModule) or any(
        is_overridden("on_fit_end", one, Callback) for one in callbacks
    )
