"""DDP: each rank holds the whole model; gradients are averaged in buckets while the backward pass runs."""

from __future__ import annotations

import gc
import re
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from trainer.config.strategy import Ddp
from trainer.core.errors import UserError
from trainer.runtime.clipping import report_clipping
from trainer.strategies.blocks import prepare
from trainer.strategies.buffers import BuffersOfRank0, DDPWithLazyBufferBroadcast
from trainer.strategies.saving import WholeCheckpoints

_INDICES = re.compile(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)")
"""Message of torch/csrc/distributed/c10d/reducer.cpp."""
_NAMES_SHOWN = 8
_HOOKS: dict[str, Any] = {
    # In a lambda because DDP refuses torch's own function, by its name, on all backends but NCCL. gloo sums bf16, too.
    "bf16_compress": lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket),
    "fp16_compress": default_hooks.fp16_compress_hook,
}
"""Communication hooks by `strategy.comm_hook`."""
_READY_TWICE = (
    "a parameter's gradient was ready twice in one backward pass, after DDP had already averaged it\n"
    "  use checkpoint(..., use_reentrant=False), or one forward pass of each layer, or set strategy=fsdp"
)
_ONE_PROCESS = "there are no gradients to average: set resources.gpus=1 (on CPU resources.cpu_processes=1)"


class RunDDPStrategy(WholeCheckpoints, BuffersOfRank0, DDPStrategy):
    """Lightning's DDPStrategy with our checkpoints, fewer buffer broadcasts and messages that name our options."""

    def __init__(self, options: Ddp, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.options = options
        self._broadcast_buffers = options.broadcast_buffers

    def setup(self, trainer: Trainer) -> None:
        """Apply activation checkpointing and compilation, then wrap the model."""
        assert self.model is not None
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if averages and self._broadcast_buffers == "auto":  # each rank averages its own buffers and evaluates with them
            self._broadcast_buffers = "always"
        prepare(self.model, self.options)
        report_clipping(self.precision_plugin)
        super().setup(trainer)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the model as Lightning does, but broadcast buffers only when they are read."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            problem = f"strategy=ddp: {type(self.lightning_module).__name__} has no trainable parameters"
            raise UserError(problem, _ONE_PROCESS)
        if self._broadcast_buffers == "always":
            return super()._setup_model(model)
        only_evaluation = self._broadcast_buffers == "evaluation"
        device_ids = self.determine_ddp_device_ids()
        # In a side stream, as Lightning does it: https://pytorch.org/docs/stable/notes/cuda.html#id5
        stream = torch.cuda.Stream() if device_ids is not None else None  # type: ignore[no-untyped-call]
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return DDPWithLazyBufferBroadcast(
                model, only_evaluation=only_evaluation, device_ids=device_ids, **self._ddp_kwargs
            )

    def configure_ddp(self) -> None:
        """Wrap the model, and remember which parameters DDP reduces."""
        super().configure_ddp()
        self._reduced = self._trainable()

    def _register_ddp_hooks(self) -> None:
        """Register `strategy.comm_hook` on any device; Lightning does so on CUDA only."""
        hook = _HOOKS.get(self.options.comm_hook)
        if hook is not None:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, hook)

    def _trainable(self) -> set[nn.Parameter]:
        assert self.model is not None
        return {parameter for parameter in self.model.parameters() if parameter.requires_grad}

    def reduce_thawed(self) -> None:
        """Wrap the model again if parameters have been unfrozen since; call it only between two epochs.

        DDP averages the gradients of the parameters that were trainable when it was constructed. Each rank would train
        layers that are unfrozen later (Lightning's BaseFinetuning) on its own samples only:
        https://github.com/pytorch/pytorch/issues/22049
        """
        if not isinstance(self.model, DistributedDataParallel) or self._trainable() <= self._reduced:
            return
        self.model = self.model.module
        gc.collect()  # frees the old wrapper, and with it its hooks on the parameters
        self.configure_ddp()

    def on_exception(self, exception: BaseException) -> None:
        """Replace messages that name options of Lightning's Trainer by messages that name options of this project."""
        message = str(exception)
        if "Expected to mark a variable ready only once" in message:
            exception.args = (_READY_TWICE,)
        super().on_exception(exception)
        if "Expected to have finished reduction" not in message or not isinstance(self.model, DistributedDataParallel):
            return
        match = _INDICES.search(message)
        # DDP numbers the parameters that need gradients, in the order of the module.
        names = [name for name, one in self.model.module.named_parameters() if one.requires_grad]
        indices = [int(index) for index in match[1].split()] if match else []
        exception.args = (unused_parameters([names[index] for index in indices if index < len(names)]),)


def unused_parameters(names: list[str]) -> str:
    """Return the message about parameters without gradients, with their `names` if they are known."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (
        "parameters were not used in producing the loss, and DDP waits for their gradients"
        f"{': ' if names else ''}{shown}{more}\n  set strategy.find_unused_parameters=true, or use them, or remove them"
    )


def build(options: Ddp, device: torch.device, timeout_s: float) -> RunDDPStrategy:
    """Build the strategy: NCCL on CUDA, else gloo.

    `static_graph` is not used: there are reports that ranks diverge with it.
    """
    return RunDDPStrategy(
        options,
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        bucket_cap_mb=options.bucket_cap_mb,
        find_unused_parameters=options.find_unused_parameters,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
    )
