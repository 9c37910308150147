"""Builds models for `trainer check --deep`.

Usage: `python -m trainer.runtime.start trainer.train.deep < JOBS.json`. Reads a JSON list of `BuildRequest` and prints
one of `ModelFacts` in the same order. Models are built on the meta device, so that a model of any size takes no memory
and no time to initialize.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from trainer.config.instantiate import instantiate, trust
from trainer.config.typed import to_config
from trainer.core import records
from trainer.core.errors import Refusal, TrainerError
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import silence_known_warnings
from trainer.train import build, deferred_modules
from trainer.train.data import Data
from trainer.train.flops import BACKWARD, forward_flops, num_inputs, sample_of
from trainer.train.model_facts import BuildRequest, ModelFacts

PUBLISHED = {"input_shape": [3, 224, 224], "num_classes": 1000, "vocab_size": 256, "sequence_length": 256}
"""Facts to use if the command line names no data: an ImageNet image, a window of bytes."""


def main() -> int:
    """Read the jobs from stdin, print their facts; returns the exit code."""
    silence_known_warnings()
    jobs = records.loads(list[BuildRequest], sys.stdin.read(), "the request of trainer check")
    # Output of a data module must not get into the JSON.
    stdout = os.dup(1)
    os.dup2(2, 1)
    facts = [_facts(job.config, job.with_data) for job in jobs]
    with open(stdout, "w") as stream:
        stream.write(records.dumps(facts))
    return 0


def _facts(plain: dict[str, Any], with_data: bool) -> ModelFacts:
    try:
        trust((plain.get("security") or {}).get("allow") or ())
        data = data_of(plain) if with_data else None
        if data is None:
            return count(plain["model"], PUBLISHED)
        return count(plain["model"], data.facts, _first_sample(data), data.trainer)
    except TrainerError as error:
        return ModelFacts(error=Refusal(message=error.message, fix=error.fix))
    except Exception as error:  # from user code
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = "the run would end the same way; `trainer fit` has the traceback in logs/"
        return ModelFacts(error=Refusal(message=f"the job cannot be built: {text}", fix=fix))


def count(
    node: dict[str, Any],
    facts: dict[str, Any],
    inputs: Sequence[torch.Tensor] = (),
    trainer: Trainer | None = None,
) -> ModelFacts:
    """Count parameters and FLOPs of the model of a configuration.

    Args:
        node: The section `model`.
        facts: Facts of the data, for arguments that are null in `node`, as in `trainer.train.build`.
        inputs: A batch of one sample; the model takes as many of its tensors as it has arguments. If empty, it is
            made from the shape or the sequence length of the model.
        trainer: The data's Trainer, for a LightningModule that uses it to create its layers.
    """
    used = {key: facts[key] for key, value in node.items() if value is None and key in facts}
    with torch.device("meta"):
        model = instantiate({**node, **used}, where="model")
        missing = _build_in_hooks(model, trainer) if isinstance(model, LightningModule) else None
    sizes = [(deferred_modules.num_elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    result = ModelFacts(at=used, parameters=total, trainable=trainable)
    if missing is not None:
        return replace(result, not_counted=missing)
    inputs = [*(inputs or sample_of({**node, **used}, facts))][: num_inputs(model)]
    if not inputs:
        return replace(result, not_counted="the inputs of the model are not known without the data: add data=...")
    if not inputs[0].is_floating_point() and inputs[0].dim() == 2:
        result = replace(result, tokens=inputs[0].shape[1])
    try:
        forward = int(forward_flops(model, inputs))
    except Exception as error:  # not every network runs without values: loops until converged, .item()
        return replace(result, not_counted=f"the model does not run on the meta device: {type(error).__name__}")
    return replace(result, forward_flops=forward, training_flops=(1 + BACKWARD) * forward)


def _build_in_hooks(module: LightningModule, trainer: Trainer | None) -> str | None:
    """Run the hooks in which a module creates its layers; returns why that failed, or None."""
    try:
        deferred_modules.run_build_hooks(module, trainer or build.plain_trainer())
    except Exception as error:  # user code, on the meta device
        reason = str(error).splitlines()[0] if str(error) else ""
        return (
            f"{type(module).__name__} builds its layers in setup or configure_model: {type(error).__name__}: {reason}"
        )
    return None


def data_of(plain: dict[str, Any]) -> Data:
    """Build and prepare the data of a job, as one rank would."""
    single = {**plain["data"], "micro_batch": None, "num_workers": 0}
    config = to_config({**plain, "data": single, "strategy": {"name": "single"}})
    data = build.build_data(config, Rank(0, 0, 1, 1, attempt=0), build.plain_trainer())
    data.set_up()
    return data


def _first_sample(data: Data) -> list[torch.Tensor]:
    """Return the tensors of the first sample."""
    batch = next(iter(data.training_loader()))
    parts = batch if isinstance(batch, (list, tuple)) else [batch]
    return [part[:1] for part in parts if isinstance(part, torch.Tensor)]
