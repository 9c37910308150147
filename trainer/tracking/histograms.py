"""Histograms of gradients and parameters in W&B (`tracking.watch`).

wandb's own `watch` hooks `forward`, which a LightningModule need not have, and counts micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from trainer.runtime.steps import steps_taken


class Histograms(Callback):
    """Logs a histogram of each parameter and of its gradient, before the optimizer step, on the first rank.

    Args:
        experiment: wandb's Run.
        which: `tracking.watch`.
        every_n_steps: Optimizer steps between two histograms.
    """

    def __init__(self, experiment: Any, which: Literal["gradients", "parameters", "all"], every_n_steps: int) -> None:
        self._experiment, self._which, self._every = experiment, which, every_n_steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the histograms of the parameters that this optimizer trains."""
        if steps_taken(trainer) % self._every:
            return
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = dict(self._of(pl_module, trained))
        if found:
            self._experiment.log(found)

    def _of(self, module: LightningModule, trained: set[int]) -> Iterator[tuple[str, Any]]:
        import wandb

        for name, parameter in module.named_parameters():
            if id(parameter) not in trained:
                continue
            tensors = {"parameters": parameter, "gradients": parameter.grad}
            for kind, tensor in tensors.items():
                if tensor is not None and self._which in (kind, "all"):
                    values = tensor.detach().float().flatten()
                    finite = values[torch.isfinite(values)].cpu().numpy()
                    if finite.size:
                        yield f"{kind}/{name}", wandb.Histogram(finite)  # type: ignore[arg-type]
