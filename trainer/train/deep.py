"""What `trainer check --deep` asks of the data plane: `train/start.py deep < CONFIGS.json`.

Reads a JSON list of {"config": ..., "with_data": bool} and prints one JSON list of `Facts` in the same order.
Models are made on the meta device, so that one of any size costs no memory and no time to fill.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.instantiate import accepts, instantiate, locate
from trainer.config.typed import to_config
from trainer.core.errors import TrainerError
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import silence_known_warnings
from trainer.train import build, late
from trainer.train.data import Data

PUBLISHED = {"input_shape": [3, 224, 224], "num_classes": 1000, "vocab_size": 256, "sequence_length": 256}
"""Stands for the data where the command line names none: a picture of ImageNet, a window of bytes."""
BACKWARD = 2
"""Of a forward pass: each product has two gradients (Kaplan et al. 2020, section 2.1)."""


@dataclass
class Facts:
    """Of one job. A floating point operation is an addition or a multiplication; only those of matrix products,
    convolutions and attention are counted, attention as if no position were masked."""

    parameters: int | None = None
    trainable: int | None = None
    forward_flops: int | None = None
    """Of one sample."""
    training_flops: int | None = None
    """Forward and backward pass of one sample, nothing recomputed."""
    tokens: int | None = None
    """Of a sample; null: it is not a sequence of tokens."""
    at: dict[str, Any] | None = None
    """What was filled in from the data, or from `PUBLISHED`."""
    not_counted: str | None = None
    """Why the operations are not known."""
    error: dict[str, str] | None = None
    """message and fix: the job cannot be built."""


def main() -> int:
    silence_known_warnings()
    jobs = json.load(sys.stdin)
    # What a data module prints must not stand among the JSON.
    answer = os.dup(1)
    os.dup2(2, 1)
    found = [asdict(_facts(job["config"], job["with_data"])) for job in jobs]
    with open(answer, "w") as stream:
        json.dump(found, stream)
    return 0


def _facts(plain: dict[str, Any], with_data: bool) -> Facts:
    try:
        data = _data(plain) if with_data else None
        if data is None:
            return count(plain["model"], PUBLISHED)
        return count(plain["model"], data.facts, _first_sample(data), data.trainer)
    except TrainerError as error:
        return Facts(error={"message": error.message, "fix": error.fix})
    except Exception as error:  # the user's own code: whatever it raises is what is wrong with the job
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = "the run would end the same way; `trainer fit` has the traceback in logs/"
        return Facts(error={"message": f"the job cannot be built: {text}", "fix": fix})


def count(
    node: dict[str, Any],
    facts: dict[str, Any],
    inputs: Sequence[torch.Tensor] = (),
    trainer: Trainer | None = None,
) -> Facts:
    """Count the model of the configuration's `model` node.

    `facts`: for arguments that are null in `node`, as in `trainer.train.build`. `inputs`: a batch of one sample,
    of which the model takes as many as it has arguments; none: made from the shape or the length that it was given.
    `trainer`: of the data, for a LightningModule that looks at them where it makes its network.
    """
    used = {key: facts[key] for key, value in node.items() if value is None and key in facts}
    with torch.device("meta"):
        model = instantiate({**node, **used}, where="model")
        missing = _build_late(model, trainer) if isinstance(model, LightningModule) else None
    found = Facts(at=used)
    sizes = [(late.size_of(parameter), parameter.requires_grad) for parameter in model.parameters()]
    found.parameters, found.trainable = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    if missing is not None:
        found.not_counted = missing
        return found
    inputs = [*(inputs or _sample({**node, **used}, facts))][: _num_inputs(model)]
    if not inputs:
        found.not_counted = "what the model reads is not known without the data: name data=... too"
        return found
    if not inputs[0].is_floating_point() and inputs[0].dim() == 2:
        found.tokens = inputs[0].shape[1]
    try:
        found.forward_flops = _forward_flops(model, [values.to("meta") for values in inputs])
    except Exception as error:  # not every network runs without values: loops until converged, .item()
        found.not_counted = f"the model does not run on the meta device: {type(error).__name__}"
        return found
    found.training_flops = (1 + BACKWARD) * found.forward_flops
    return found


def _build_late(module: LightningModule, trainer: Trainer | None) -> str | None:
    """Have the module make its network in its hooks; why it could not."""
    try:
        late.build_now(module, trainer or build.plain_trainer())
    except Exception as error:  # the user's own code, on the meta device
        reason = str(error).splitlines()[0] if str(error) else ""
        return (
            f"{type(module).__name__} makes its network in setup or configure_model: {type(error).__name__}: {reason}"
        )
    return None


def _forward_flops(model: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    model.eval()  # batch normalisation has no deviation of one sample
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*inputs)
    return int(counter.get_total_flops())


def _num_inputs(model: nn.Module) -> int:
    """Arguments of `forward` that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in parameters)


def _sample(arguments: dict[str, Any], facts: dict[str, Any]) -> list[torch.Tensor]:
    """One sample on the meta device; empty where the arguments do not tell what it is."""
    length = arguments.get("sequence_length") or facts.get("sequence_length")
    if length and accepts(locate(arguments["_target_"], "model._target_"), "vocab_size"):
        tokens = torch.empty(1, length, dtype=torch.int64, device="meta")
        shape = arguments.get("input_shape")
        return [torch.empty(1, *shape, device="meta"), tokens] if shape else [tokens]
    if arguments.get("input_shape"):
        return [torch.empty(1, *arguments["input_shape"], device="meta")]
    return []


def _data(plain: dict[str, Any]) -> Data:
    """The job's own data, which is prepared for that."""
    alone = {**plain["data"], "micro_batch": None, "num_workers": 0}
    config = to_config({**plain, "data": alone, "strategy": {"name": "single"}})
    data = build.build_data(config, Rank(0, 0, 1, 1, attempt=0), build.plain_trainer())
    data.set_up()
    return data


def _first_sample(data: Data) -> list[torch.Tensor]:
    """Its tensors."""
    batch = next(iter(data.training_loader()))
    parts = batch if isinstance(batch, (list, tuple)) else [batch]
    return [part[:1] for part in parts if isinstance(part, torch.Tensor)]
