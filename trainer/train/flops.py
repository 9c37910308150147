"""FLOPs of training on one sample, and the time that they take at the GPUs' peak rate: the two parts of MFU.

MFU (model FLOPs utilization) is the throughput as a share of what the GPUs could reach at their peak (Chowdhery et al.
2022, PaLM, appendix B): `tokens/s * (6 N + 12 L d T) / peak`, with N parameters without position embeddings and an
untied input embedding, L layers of width d, and sequences of T tokens. Attention is counted as if no position were
masked. What activation checkpointing computes again is not counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.func import functional_call

from trainer.callbacks.metrics import TrainMetrics
from trainer.config.instantiate import accepts, locate
from trainer.config.schema import Config
from trainer.hardware.peaks import arithmetic_of, peak_flops
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import device_of
from trainer.tasks.base import Task
from trainer.train.precision import precision_of

BACKWARD = 2
"""FLOPs of a backward pass per forward FLOP: each product has two gradients (Kaplan et al. 2020, section 2.1)."""
_RUN_WITHOUT_VALUES = tuple(
    f"trainer.models.{name}" for name in ("efficientnet_lite", "mlp", "resnet", "timm", "vgg", "vit")
)
"""Modules whose networks keep nothing of a forward pass."""


@dataclass(frozen=True)
class Work:
    """FLOPs of the forward and backward pass of one sample."""

    flops: float
    formula: str
    """How they were counted, for the log."""


@dataclass(frozen=True)
class Peak:
    """Peak rate of one device."""

    flops: float
    """FLOP/s."""
    text: str
    """Rate, device and arithmetic, for the log."""


def set_mfu(metrics: TrainMetrics, module: LightningModule, config: Config, rank: Rank, facts: dict[str, Any]) -> None:
    """Let `metrics` have the MFU if the FLOPs of a sample and the peak rate of the GPUs are known; log it or why not.

    Args:
        metrics: The metrics of the training.
        module: The module, with all of its parameters, before a strategy wraps it.
        config: The run's configuration.
        rank: This rank.
        facts: Facts of the data.
    """
    device = device_of(config, rank)
    if device.type != "cuda":
        return
    peak = peak_of(device, precision_of(config, device))
    work = work_of(module, config.model, facts) if isinstance(peak, Peak) else peak
    text = f"no MFU: {work}"
    if isinstance(peak, Peak) and isinstance(work, Work):
        metrics.peak_s_per_sample = work.flops / (peak.flops * rank.world_size)
        text = f"MFU: {work.formula}, peak {peak.text}"
    if rank.is_first:
        print(text, flush=True)


def work_of(module: LightningModule, model_node: dict[str, Any], facts: dict[str, Any]) -> Work | str:
    """Return the FLOPs of a sample, or why they are not known.

    A network may have a method `flops_per_token(sequence_length)`. The forward pass of other networks of this project
    is run once without values, on the meta device. Those of users are not: their forward pass may keep what it saw.

    Args:
        module: The module, with all of its parameters, before a strategy wraps it.
        model_node: The section `model`.
        facts: Facts of the data.
    """
    if not all(parameter.requires_grad for parameter in module.parameters()):
        return "some parameters are frozen"
    network = module.model if isinstance(module, Task) else module
    length = facts.get("sequence_length")
    count: Callable[[int], float | None] | None = getattr(network, "flops_per_token", None)
    if length and count is not None and (per_token := count(length)) is not None:
        return Work(per_token * length, f"6 N + 12 L d T = {per_token / 1e9:.4g} GFLOP per token")
    if not type(network).__module__.startswith(_RUN_WITHOUT_VALUES):
        return f"the FLOPs of {type(network).__name__} are not known (a method flops_per_token would return them)"
    arguments = {key: facts.get(key) if value is None else value for key, value in model_node.items()}
    try:
        inputs = sample_of(arguments, facts)[: num_inputs(network)]
        forward = forward_flops(network, inputs) if inputs else 0
    except Exception as error:  # not every network runs without values: loops until converged, .item()
        return f"the model does not run on the meta device ({type(error).__name__})"
    if not forward:
        return "the inputs of the model are not known"
    flops = (1 + BACKWARD) * forward
    return Work(flops, f"{1 + BACKWARD} times the forward pass = {flops / 1e9:.4g} GFLOP per sample")


def peak_of(device: torch.device, precision: str) -> Peak | str:
    """Return the peak rate of a GPU for what `precision` computes in, or why it is not known."""
    name = torch.cuda.get_device_name(device)
    arithmetic = arithmetic_of(precision, torch.get_float32_matmul_precision())
    flops = peak_flops(name, arithmetic)
    if flops is None:
        return f"the peak rate of {name!r} in {arithmetic} is not in the hardware catalogue"
    return Peak(flops, f"{flops / 1e12:.4g} TFLOP/s ({name}, {arithmetic})")


def forward_flops(network: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Return the FLOPs of a forward pass of a batch of one, run on the meta device; `network` is not changed."""
    from torch.utils.flop_counter import FlopCounterMode  # needed on GPUs only, and 6 ms

    values = {name: _on_meta(one) for name, one in (*network.named_parameters(), *network.named_buffers())}
    modes = {part: part.training for part in network.modules()}
    counter = FlopCounterMode(display=False)
    network.eval()  # batch normalization has no variance for one sample
    try:
        with torch.no_grad(), counter:
            functional_call(network, values, tuple(one.to("meta") for one in inputs))
    finally:
        for part, mode in modes.items():
            part.training = mode
    return float(counter.get_total_flops())


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def num_inputs(network: nn.Module) -> int:
    """Return the number of arguments of `forward` without a default."""
    parameters = inspect.signature(network.forward).parameters.values()
    return sum(item.default is item.empty and item.kind is not item.VAR_KEYWORD for item in parameters)


def sample_of(arguments: dict[str, Any], facts: dict[str, Any]) -> list[torch.Tensor]:
    """Return one sample on the meta device; empty if the arguments of the model do not determine it."""
    length = arguments.get("sequence_length") or facts.get("sequence_length")
    if length and accepts(locate(arguments["_target_"], "model._target_"), "vocab_size"):
        tokens = torch.empty(1, length, dtype=torch.int64, device="meta")
        shape = arguments.get("input_shape")
        return [torch.empty(1, *shape, device="meta"), tokens] if shape else [tokens]
    if shape := arguments.get("input_shape") or facts.get("input_shape"):
        return [torch.empty(1, *shape, device="meta")]
    return []
