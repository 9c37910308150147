"""Counts the bytes that FSDP2 gathers and reduces in a step, without a GPU or memory for the model.

    python -m benchmarks.fsdp_bytes [--ranks 8] [--output benchmarks/results/fsdp_bytes.md]

A step of each model runs on fake tensors in a fake process group; a dispatch mode counts the collectives. Bytes are
those of the gathered tensors: a rank receives (ranks - 1) / ranks of them. "Most held" is the largest sum of gathered
weights at any matrix product.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.strategy import Fsdp
from trainer.models.transformer import Transformer
from trainer.strategies import MeshSizes, fsdp
from trainer.strategies.mesh import make_mesh
from trainer.tasks.language_modelling import LanguageModelling

LENGTH = 128
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2 124M, tied": {"vocab_size": 50_257, "dim": 768, "layers": 12, "heads": 12, "norm": "layer"}
    | {"activation": "gelu", "positions": "learned", "bias": True},
    "Llama 1B, untied": {"vocab_size": 128_256, "dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8}
    | {"ffn_dim": 8192, "tied": False},
    "Llama 3 8B": {"vocab_size": 128_256, "dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8}
    | {"ffn_dim": 14_336, "tied": False},
}
_FAKE = FakeTensorMode()


class Count(TorchDispatchMode):
    """Counts collectives and the weights that are gathered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gathered, self.reduced, self.gathers, self.held = 0, 0, 0, 0
        self._parts = [part for part in module.modules() if isinstance(part, FSDPModule)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.gathered += args[0].numel() * args[0].itemsize
            self.gathers += 1
        elif name == "c10d::_reduce_scatter_base_":
            self.reduced += args[1].numel() * args[1].itemsize
        elif name in ("aten::mm", "aten::addmm"):
            self.held = max(self.held, self.held_now())
        return func(*args, **(kwargs or {}))

    def held_now(self) -> int:
        """Return the bytes of the weights that are gathered."""
        return sum(map(_held_bytes, _groups(self._parts)))


def _groups(parts: list[Any]) -> list[Any]:
    groups = [part._get_fsdp_state()._fsdp_param_group for part in parts]
    return list({id(group): group for group in groups if group is not None}.values())


def _held_bytes(group: Any) -> int:
    if not group.is_unsharded:
        return 0
    return sum(one._unsharded_param.numel() * one._unsharded_param.itemsize for one in group.fsdp_params)


def sharded(options: dict[str, Any], ranks: int, strategy_options: Fsdp | None) -> LanguageModelling:
    """Return a language model of fake tensors, sharded by the strategy; None: not sharded."""
    strategy = fsdp.RunFSDPStrategy(strategy_options or Fsdp(), MeshSizes(1, ranks, 1), "fake", 60.0)
    strategy._device_mesh = make_mesh("cpu", strategy.sizes)
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    with _FAKE:
        module = LanguageModelling(Transformer(sequence_length=LENGTH, **options))
        if strategy_options is not None:
            strategy._lightning_module = strategy.model = module
            strategy._shard(module)
            vars(module)["strategy"] = strategy
    return module


def train(module: LanguageModelling, backward: bool = True) -> None:
    """Run a forward and a backward pass."""
    with _FAKE, torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step((torch.zeros(1, LENGTH).long(), torch.zeros(1, LENGTH).long()), 0)
        if backward:
            loss.backward()


def step(options: dict[str, Any], ranks: int, strategy_options: Fsdp | None = None) -> Count:
    """Run one training step after a first one, and return its counts."""
    module = sharded(options, ranks, strategy_options or Fsdp())
    train(module)
    with Count(module) as count:
        train(module)
    return count


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.ranks)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    lines = [
        f"Commit {commit.strip()}, torch {torch.__version__}, {arguments.ranks} ranks, bf16-mixed",
        "",
        "| model | gathers | gathered (GB) | reduced (GB) | most held (GB) |",
        "|---|---|---|---|---|",
    ]
    for name, options in MODELS.items():
        found = step(options, arguments.ranks)
        sizes = (f"{size / 1e9:.3f}" for size in (found.gathered, found.reduced, found.held))
        lines.append(f"| {name} | {found.gathers} | {' | '.join(sizes)} |")
    text = "\n".join(lines) + "\n"
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
