"""Peak memory of a training step of a language model, by strategy, on fake tensors.

    python benchmarks/memory/step.py --package FOLDER --output before.json

FOLDER is a checkout of this project: its `trainer` is measured, with its defaults for GPUs. AdamW is fused if its
`optimizer=adamw` has `fused: auto`, else it uses the foreach kernels, which are torch's own default on CUDA.
`report.py` makes a table.

DeepSpeed is not measured: it reads pointers, which fake tensors do not have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """A model, its batch on one rank, and the activation checkpointing that is asked for."""

    model: dict[str, Any]
    batch: int
    length: int
    checkpointing: str = "none"


LLAMA = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "rope_theta": 5e5, "vocab_size": 128256}
SETTINGS = {
    "GPT-2 124M, 64 x 1024": Setting(
        {"vocab_size": 50257, "dim": 768, "layers": 12, "heads": 12, "norm": "layer", "activation": "gelu"}
        | {"positions": "learned", "bias": True, "tied": True},
        64,
        1024,
    ),
    "1B, 4 x 4096": Setting(
        LLAMA | {"dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn_dim": 8192, "tied": True}, 4, 4096
    ),
    "8B, 1 x 4096, full": Setting(
        LLAMA | {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn_dim": 14336, "tied": False},
        1,
        4096,
        "full",
    ),
}
"""GPT-2 small; the shapes of Llama 3.2 1B and Llama 3 8B. `full`: `strategy.activation_checkpointing=full`."""
STRATEGIES = {"single": 1, "ddp on 8": 8, "fsdp on 1": 1, "fsdp on 8": 8, "hsdp on 2 x 4": 8, "tp on 4": 4}
"""Strategy to number of ranks: GPT-2 has 12 heads, which 8 ranks cannot share."""


def measure(setting: Setting, name: str, ranks: int) -> dict[str, float]:
    """Return the bytes in GiB that parameters and optimizer states take, and the peak of the second step."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from tracked import Tracked, as_on_cuda, real_meshes

    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        wrap = _wrapper(name.split(" ")[0], ranks, setting.checkpointing)
        with ExitStack() as stack:
            for context in (FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(), real_meshes()):
                stack.enter_context(context)
            tracked = stack.enter_context(Tracked())
            stack.enter_context(tracked.resizing())
            return _steps(setting, wrap, tracked)
    finally:
        torch.distributed.destroy_process_group()


def _steps(setting: Setting, wrap: Callable[[Any], None], tracked: Any) -> dict[str, float]:
    from trainer.models.transformer import Transformer
    from trainer.tasks.language_modelling import LanguageModelling

    arguments = dict(setting.model)
    module = LanguageModelling(Transformer(arguments.pop("vocab_size"), setting.length, **arguments))
    wrap(module)
    for parameter in module.parameters():
        tracked.add(parameter)
    optimizer = _optimizer(module)
    tokens = torch.zeros(setting.batch, setting.length, dtype=torch.long)
    for _ in range(2):  # the second step has the optimizer states from the beginning
        at_rest = tracked.peak = tracked.alive
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning does
            loss = module.training_step((tokens, tokens), 0)
        loss.backward()
        del loss
        passes, tracked.peak = tracked.peak, tracked.alive
        _clip(module)
        optimizer.step()
        update = tracked.peak
        optimizer.zero_grad()
    return {"rest": at_rest / GIB, "passes": passes / GIB, "update": update / GIB}


def _wrapper(name: str, ranks: int, checkpointing: str) -> Callable[[Any], None]:
    """Return what prepares a module as the strategy does. The device mesh has values, so it is made before."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    from trainer import strategies
    from trainer.config.strategy import STRATEGIES as OPTIONS
    from trainer.strategies.blocks import prepare
    from trainer.strategies.mesh import TENSOR, make_mesh
    from trainer.strategies.tensor_parallel import parallelize

    chosen = replace(OPTIONS[name](), activation_checkpointing=checkpointing)
    if name in ("single", "ddp"):

        def whole(module: Any) -> None:
            prepare(module, chosen)
            if name == "ddp":
                _make_buckets(module)

        return whole
    if name == "hsdp":
        chosen = replace(chosen, shard_size=4)
    strategy: Any = strategies.build(chosen, ranks, torch.device("cpu"), 60.0)
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    strategy._device_mesh = make_mesh("cpu", strategy.sizes)

    # as the strategy's setup does; the first versions have no such options
    splits = {key: getattr(chosen, f"{key}_parallel", None) for key in ("sequence", "loss")}
    splits = {key: value for key, value in splits.items() if value is not None}

    def sharded(module: Any) -> None:
        parallelize(module, strategy._device_mesh[TENSOR], **splits)
        strategy._shard(module)

    return sharded


def _make_buckets(module: Any) -> None:
    """Keep gradients as DDP's Reducer does, which reads pointers that fake tensors do not have.

    With `gradient_as_bucket_view` they are views of buckets that are there all the time.
    """
    for parameter in module.parameters():
        bucket = torch.empty_like(parameter)

        def into_bucket(one: torch.Tensor, bucket: torch.Tensor = bucket) -> None:
            assert one.grad is not None
            bucket.copy_(one.grad)
            one.grad = bucket

        parameter.register_post_accumulate_grad_hook(into_bucket)


def _optimizer(module: Any) -> Any:
    """Return AdamW as the project's default makes it for parameters on a GPU."""
    from trainer.config.compose import compose

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = compose(["optimizer=adamw"], config_dirs=[]).config["optimizer"].get("fused") == "auto"
    return torch.optim.AdamW(parameters, lr=1e-4, **({"fused": True} if fused else {"foreach": True}))


def _clip(module: Any) -> None:
    from trainer.strategies.fsdp import clip_by_global_norm

    clip_by_global_norm(list(module.parameters()), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="checkout whose trainer is measured")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", default="", help="regular expression of settings and strategies")
    options = parser.parse_args()
    sys.path.insert(0, str(options.package.resolve()))
    output = options.output.resolve()
    os.chdir(options.package)  # whose conf/ is composed
    found: dict[str, dict[str, Any]] = {}
    for title, setting in SETTINGS.items():
        for name, ranks in STRATEGIES.items():
            if not re.search(options.only, f"{title}, {name}"):
                continue
            begun = time.monotonic()
            found.setdefault(title, {})[name] = measure(setting, name, ranks)
            print(title, name, found[title][name], f"{time.monotonic() - begun:.0f} s", flush=True)
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
