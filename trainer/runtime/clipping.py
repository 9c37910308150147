"""Gradient clipping by norm that reports the norm, so that nothing else has to read all gradients again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.tensor import DTensor

OnNorm = Callable[[torch.Tensor], None]
"""Called with the norm, a scalar on the device, before the gradients are scaled."""
Clip = Callable[[Iterable[nn.Parameter], float, OnNorm], Any]


class ReportedClipping:
    """Replaces the method `clip_grad_by_norm` of a precision plugin.

    Args:
        plugin: The plugin.
        clip: Clips gradients in place to a norm, and reports the norm that they had over all ranks.
    """

    def __init__(self, plugin: Precision, clip: Clip) -> None:
        self._plugin, self._clip = plugin, clip
        self.listener: Callable[[Any, torch.Tensor], None] | None = None
        """Called with the optimizer and the norm at each clipping."""

    def __call__(self, optimizer: Any, clip_val: int | float, *_: Any) -> None:
        """Clip, as `Precision.clip_grad_by_norm` does."""
        self._clip(self._plugin.main_params(optimizer), float(clip_val), lambda norm: self._report(optimizer, norm))

    def _report(self, optimizer: Any, norm: torch.Tensor) -> None:
        if self.listener is not None:
            self.listener(optimizer, norm)


def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float, on_norm: OnNorm) -> None:
    """Clip as `torch.nn.utils.clip_grad_norm_` does, bit for bit, where each rank has whole gradients."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    on_norm(norm)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def global_norm(gradients: list[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """Return the norm of whole or sharded gradients over all ranks. Collective with sharded ones.

    `torch.nn.utils.get_total_norm` cannot mix tensors of different meshes, which tensor parallelism has.
    """
    by_mesh: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = []
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(group, norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if len(norms) == 1:
        return norms[0]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]), norm_type)
    return total


def report_clipping(plugin: Precision, clip: Clip = clip_by_norm) -> None:
    """Have `plugin` clip by `clip` and report the norms."""
    plugin.clip_grad_by_norm = ReportedClipping(plugin, clip)  # type: ignore[method-assign]


def reported_clipping(trainer: Trainer, module: LightningModule) -> ReportedClipping | None:
    """Return the clipping that reports a norm at each step for which `clips_by_norm` is true, if there is one.

    There is none where the module clips by itself, or where another plugin does (DeepSpeed).
    """
    names = ("configure_gradient_clipping", "clip_gradients")
    own = any(is_overridden(name, module, LightningModule) for name in names)
    clipping: Any = trainer.precision_plugin.clip_grad_by_norm
    return clipping if isinstance(clipping, ReportedClipping) and not own else None


def clips_by_norm(trainer: Trainer) -> bool:
    """Return whether Lightning clips by norm before the next optimizer step; a callback may change that."""
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    return value is not None and value > 0 and algorithm in (None, GradClipAlgorithmType.NORM)
