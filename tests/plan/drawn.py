"""Cases drawn by seed: a decoder, its strategy, precision and batch; and both engines on a case."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config.strategy import STRATEGIES
from trainer.models.transformer import Transformer
from trainer.plan.closed_form import Case, Estimate, estimate
from trainer.plan.decoder import Decoder
from trainer.plan.messages import Simulated
from trainer.plan.simulation import Setting, simulate
from trainer.plan.states import Layout
from trainer.tasks.language_modelling import LanguageModelling


@dataclass(frozen=True)
class Drawn:
    """A case of both engines."""

    model: dict[str, Any]
    batch: int
    strategy: str
    ranks: int
    group: int
    precision: str
    checkpointing: str
    device: str
    accumulates: bool
    reduce: str
    optimizer: str = "AdamW"
    foreach: bool = False
    """Whether the optimizer's kernels take several tensors at once; else AdamW's are fused, others take one by one."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that are not trained."""
    lora_rank: int = 0
    """Rank of the adapters of all linear layers in blocks, which are trained with what is outside of blocks."""


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA adapter (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        added: torch.Tensor = self.base(features) + self.up(self.down(features))
        return added


def draw(seed: int) -> Drawn:
    """Return the case of a seed."""
    choose = random.Random(seed)
    heads = choose.choice([4, 8])
    model = {
        "vocab_size": choose.choice([300, 4096, 50257]),
        "sequence_length": choose.choice([256, 512, 1024]),
        "dim": choose.choice([128, 256, 384]),
        "layers": choose.choice([2, 3, 6]),
        "heads": heads,
        "kv_heads": choose.choice([None, 2]),
        "norm": choose.choice(["rms", "layer"]),
        "activation": choose.choice(["swiglu", "gelu"]),
        "positions": choose.choice(["rotary", "learned"]),
        "bias": choose.choice([False, True]),
        "tied": choose.choice([False, True]),
    }
    strategy = choose.choice(["single", "ddp", "fsdp", "fsdp", "hsdp"])
    ranks = 1 if strategy == "single" else choose.choice([2, 4, 6, 8])
    group = {"fsdp": ranks, "hsdp": ranks // 2}.get(strategy, 1)
    device = choose.choice(["cpu", "cuda", "cuda"])
    model["dropout"] = choose.choice([0.0, 0.1]) if device == "cuda" else 0.0
    return Drawn(
        model,
        choose.choice([2, 4, 8]),
        strategy,
        ranks,
        group,
        choose.choice(["bf16-mixed", "bf16-mixed", "32-true", "bf16-true"]),
        choose.choice(["none", "full"]),
        device,
        choose.choice([False, True]),
        choose.choice(["float32", "bfloat16"]),
        choose.choice(["AdamW", "SGD", "RMSprop"]),
    )


def module_of(case: Drawn) -> LanguageModelling:
    """The network of a case in its task."""
    arguments = dict(case.model)
    model = Transformer(arguments.pop("vocab_size"), arguments.pop("sequence_length"), **arguments)
    if case.lora_rank:
        linear = [name for name, one in model.body.named_modules() if isinstance(one, nn.Linear)]
        for name in linear:
            parent, _, own = name.rpartition(".")
            setattr(model.body.get_submodule(parent), own, Adapted(model.body.get_submodule(name), case.lora_rank))
    for name, parameter in model.named_parameters():
        if name.startswith(case.frozen or ("-",)):
            parameter.requires_grad_(False)
    return LanguageModelling(model)


def optimizer_of(case: Drawn, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a case, without temporary tensors."""
    kernel: dict[str, Any] = {"fused": True} if case.optimizer == "AdamW" else {"foreach": False}
    kernel = {"foreach": True} if case.foreach else kernel
    momentum = {} if case.optimizer == "AdamW" else {"momentum": 0.9}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, case.optimizer)(trained, lr=1e-4, **kernel, **momentum)
    return optimizer


def batch_of(case: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a micro-batch."""
    tokens = torch.zeros(case.batch, case.model["sequence_length"], dtype=torch.long)
    return tokens, tokens


def strategy_of(case: Drawn) -> Any:
    """The options of the strategy of a case."""
    options: dict[str, Any] = {"activation_checkpointing": case.checkpointing}
    if case.group > 1 or case.strategy in ("fsdp", "hsdp"):
        options["reduce_dtype"] = case.reduce
    if case.strategy == "hsdp":
        options["shard_size"] = case.group
    if case.strategy.startswith("deepspeed"):
        options["reduce_bucket_size"] = 2**16
    return STRATEGIES[case.strategy](**options)


def setting_of(case: Drawn, block: int = 1) -> Setting:
    """The setting of the simulation."""
    return Setting(
        strategy_of(case),
        case.ranks,
        precision=case.precision,
        device=case.device,
        clips=True,
        accumulates=case.accumulates,
        classes=case.model["vocab_size"],
        block=block,
    )


def by_simulation(case: Drawn) -> Simulated:
    """The memory of a case on fake tensors."""
    return simulate(
        lambda: module_of(case), batch_of(case), lambda module: optimizer_of(case, module), setting_of(case)
    )


def by_formula(case: Drawn) -> Estimate:
    """The memory of a case in closed form."""
    return estimate(case_of(case))


def case_of(case: Drawn) -> Case:
    """A case as the closed form takes it."""
    node = {"_target_": f"torch.optim.{case.optimizer}", "foreach": False}
    node |= {} if case.optimizer == "AdamW" else {"momentum": 0.9}
    return Case(
        Decoder(**case.model),
        case.batch,
        Layout(case.strategy, case.group, 1, case.ranks, precision=case.precision),
        node,
        checkpointing=case.checkpointing,
        device=case.device,
        accumulates=case.accumulates,
        reduce_bytes={"float32": 4, "bfloat16": 2}[case.reduce],
    )
