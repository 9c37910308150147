"""Pairs of strategy, precision, optimizer and device that a rank would refuse after the launch.

Found by building what a rank would build for every pair, and by reading what Lightning, DeepSpeed and torch raise.
`tests/config/test_strategy_limits.py` repeats that for each pair that is refused here, and for those that are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core.errors import UserError

FSDP = ("fsdp", "hsdp", "tp")
"""Strategies based on FSDP2, which use Lightning's ModelParallelStrategy."""
LOW_MEMORY = "trainer.optimizers.LowMemoryAdamW"
STATES = ("8bit", "bfloat16", "float32")
"""Its `states`."""
MUON = "trainer.optimizers.Muon"
_UNSPLIT = tuple(f"trainer.models.{name}." for name in ("mlp", "resnet", "vgg", "vit", "efficientnet_lite", "rnn"))
"""Networks of this project without a method `tensor_parallel`."""


@dataclass(frozen=True)
class Pairing:
    """The parts of a job that exclude each other."""

    strategy: str
    """Name, with `auto` resolved."""
    options: Mapping[str, Any]
    """Section `strategy`."""
    trainer: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    model: str
    """Import path of the model."""
    on_gpu: bool
    world_size: int
    processes_per_node: int

    @property
    def precision(self) -> str:
        """Value of `trainer.precision`."""
        return str(self.trainer["precision"])

    @property
    def target(self) -> str:
        """Import path of the optimizer."""
        return str(self.optimizer.get("_target_"))

    @property
    def is_deepspeed(self) -> bool:
        """Whether the strategy is one of ZeRO."""
        return self.strategy.startswith("deepspeed")

    @property
    def clip(self) -> Any:
        """Threshold of gradient clipping; null: none."""
        return self.trainer.get("gradient_clip_val") or self.trainer.get("gradient_clip_norm")


def has_fused(target: object, strategy: str) -> bool:
    """Return whether torch can fuse AdamW, Adam or SGD under a strategy.

    DTensor has a sharding strategy for the fused kernels of Adam and AdamW, not for that of SGD (torch 2.11 to 2.13).
    """
    return strategy not in FSDP or target != "torch.optim.SGD"


def problems_of_pairs(pairing: Pairing) -> Iterator[UserError]:
    """Yield the pairs that cannot work."""
    yield from _precision(pairing)
    yield from _clipping(pairing)
    yield from _optimizer(pairing)
    yield from _lbfgs(pairing)
    yield from _own_optimizers(pairing)
    yield from _offload(pairing)
    yield from _tensor_parallel(pairing)


def _precision(pairing: Pairing) -> Iterator[UserError]:
    precision, strategy = pairing.precision, pairing.strategy
    if precision == "16-mixed" and strategy in FSDP:
        yield UserError(
            f"trainer.precision=16-mixed is not supported by strategy={strategy}: FSDP2 has no loss scaling",
            "use trainer.precision=bf16-mixed, or strategy=ddp",
        )
    if precision == "64-true" and (strategy in FSDP or pairing.is_deepspeed):
        fix = "use strategy=ddp, or trainer.precision=32-true"
        yield UserError(f"trainer.precision=64-true is not supported by strategy={strategy}", fix)
    if precision in ("16-mixed", "16-true") and pairing.is_deepspeed and not pairing.on_gpu:
        fix = "use trainer.precision=bf16-mixed or trainer.precision=32-true, or GPUs"
        yield UserError(f"trainer.precision={precision}: DeepSpeed has no fp16 on CPU ranks", fix)


def _clipping(pairing: Pairing) -> Iterator[UserError]:
    if pairing.precision == "16-mixed" and pairing.clip and pairing.optimizer.get("fused") is True:
        yield UserError(
            "optimizer.fused=true: a fused optimizer unscales the gradients of 16-mixed after they would be clipped",
            "use trainer.precision=bf16-mixed, optimizer.fused=null, or no gradient clipping",
        )
    if pairing.trainer.get("gradient_clip_algorithm") == "value" and pairing.is_deepspeed:
        fix = f"use trainer.gradient_clip_norm={pairing.trainer.get('gradient_clip_val')}, or another strategy"
        yield UserError("trainer.gradient_clip_algorithm=value: DeepSpeed clips by norm only", fix)


def _optimizer(pairing: Pairing) -> Iterator[UserError]:
    if pairing.target == "torch.optim.Adafactor" and pairing.strategy in FSDP:
        yield UserError(
            f"torch.optim.Adafactor does not work with strategy={pairing.strategy}: it computes norms of rows and"
            " columns in place, which sharded parameters do not have",
            "use optimizer=adamw_8bit for small states, or strategy=ddp",
        )
    if pairing.optimizer.get("fused") is True and not has_fused(pairing.target, pairing.strategy):
        fix = "write optimizer.fused=false, or leave it out"
        yield UserError(f"optimizer.fused=true: torch has no fused SGD of what strategy={pairing.strategy} shards", fix)
    if pairing.target == "torch.optim.Muon" and pairing.model.startswith("trainer.models."):
        fix = "use optimizer=muon, which gives the other parameters to AdamW"
        yield UserError("torch.optim.Muon accepts only matrices, and the model also has vectors and embeddings", fix)


def _lbfgs(pairing: Pairing) -> Iterator[UserError]:
    """Yield that LBFGS has neither whole parameters nor one loss, by which it ends a step."""
    if pairing.target.rpartition(".")[2] != "LBFGS" or pairing.strategy == "single":
        return
    count = f"resources.{'gpus' if pairing.on_gpu else 'cpu_processes'}=1"
    fix = f"train on one rank: {count} strategy=single, or use optimizer=adamw"
    if pairing.strategy != "ddp":
        yield UserError(f"LBFGS needs whole parameters, but strategy={pairing.strategy} shards them", fix)
    elif pairing.world_size > 1:
        problem = f"LBFGS ends a step by the loss, of which each of the {pairing.world_size} ranks has its own"
        yield UserError(f"{problem}: they would wait for each other forever", fix)


def _own_optimizers(pairing: Pairing) -> Iterator[UserError]:
    states = pairing.optimizer.get("states", "8bit")
    if pairing.target == LOW_MEMORY and states not in STATES:
        fix = f"choose one of: {', '.join(STATES)}"
        yield UserError(f"optimizer.states={states}: invalid choice", fix)
    if pairing.target in (LOW_MEMORY, MUON) and pairing.precision == "64-true":
        name = pairing.target.rpartition(".")[2]
        yield UserError(
            f"trainer.precision=64-true: {name} computes in fp32, and would round the weights to it in every step",
            "use optimizer=adamw, or trainer.precision=32-true",
        )
    is_8bit = pairing.target == LOW_MEMORY and pairing.optimizer.get("states", "8bit") == "8bit"
    offloads = pairing.strategy in FSDP and bool(pairing.options.get("cpu_offload"))
    if pairing.target == MUON and pairing.is_deepspeed:
        yield UserError(
            f"optimizer=muon needs matrices, but strategy={pairing.strategy} flattens all parameters into one vector",
            "use strategy=fsdp, or optimizer=adamw",
        )
    if is_8bit and pairing.is_deepspeed:
        yield UserError(
            f"optimizer=adamw_8bit has a scale per block of a row, but strategy={pairing.strategy} flattens all"
            " parameters into one vector",
            "use strategy=fsdp, or optimizer=adamw_bf16",
        )
    if is_8bit and pairing.strategy == "tp":
        yield UserError(
            "optimizer=adamw_8bit has a scale per block of a row, but strategy=tp splits rows over the ranks",
            "use strategy=fsdp, or optimizer=adamw_bf16",
        )
    if (is_8bit or pairing.target == MUON) and offloads and pairing.on_gpu:
        name = "muon" if pairing.target == MUON else "adamw_8bit"
        yield UserError(
            f"optimizer={name} computes on the GPU, but strategy.cpu_offload=true keeps its state in host memory",
            "use strategy.cpu_offload=false, or optimizer=adamw",
        )


def _offload(pairing: Pairing) -> Iterator[UserError]:
    if pairing.options.get("offload_optimizer") == "nvme" and pairing.strategy != "deepspeed_zero3":
        yield UserError(
            f"strategy.offload_optimizer=nvme: {pairing.strategy} would keep the state on the GPU without a message",
            "use strategy=deepspeed_zero3, or strategy.offload_optimizer=cpu",
        )


def _tensor_parallel(pairing: Pairing) -> Iterator[UserError]:
    size = pairing.options.get("tensor_parallel_size")
    size = pairing.processes_per_node if size is None else size
    splits = pairing.strategy == "tp" and size > 1 and pairing.world_size % size == 0
    if splits and pairing.model.startswith(_UNSPLIT):
        message = f"strategy=tp: {pairing.model} does not define which layers to split"
        yield UserError(message, "use strategy=fsdp, or model=transformer")
