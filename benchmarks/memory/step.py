"""Peak memory of a training step of a language model, by strategy, on fake tensors.

    python benchmarks/memory/step.py --package FOLDER --output before.json

FOLDER is a checkout of this project that has `trainer plan`: its `trainer` is measured, with its defaults for GPUs.
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
from dataclasses import dataclass
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
    from trainer.config.strategy import STRATEGIES as OPTIONS
    from trainer.models.transformer import Transformer
    from trainer.plan.simulation import Setting as Simulation
    from trainer.plan.simulation import simulate
    from trainer.tasks.language_modelling import LanguageModelling

    options = OPTIONS[name.split(" ")[0]](activation_checkpointing=setting.checkpointing)
    if name.startswith("hsdp"):
        options.shard_size = 4
    arguments = dict(setting.model)
    vocabulary = arguments.pop("vocab_size")
    tokens = torch.zeros(setting.batch, setting.length, dtype=torch.long)
    found = simulate(
        lambda: LanguageModelling(Transformer(vocabulary, setting.length, **arguments)),
        (tokens, tokens),
        _optimizer,
        Simulation(options, ranks, precision="bf16-mixed", clips=True, classes=vocabulary),
    )
    return {"rest": found.rest / GIB, "passes": found.passes / GIB, "update": found.update / GIB}


def _optimizer(module: Any) -> Any:
    """Return AdamW as the project's default makes it for parameters on a GPU."""
    return torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=1e-4, fused=True)


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
