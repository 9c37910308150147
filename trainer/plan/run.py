"""Simulates the variants of a job for `trainer plan`.

Usage: `python -m trainer.runtime.start trainer.plan.run < REQUEST.json`. Reads a `SimulationRequest` and prints a JSON
list with a `SimulationAnswer` for each variant.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves, tree_map_only

from trainer.config.instantiate import accepts, locate, trust
from trainer.config.schema import Config
from trainer.config.strategy import STRATEGIES
from trainer.config.typed import to_config
from trainer.core import records
from trainer.core.errors import Refusal, TrainerError, UserError
from trainer.plan import bench
from trainer.plan.decoder import Decoder
from trainer.plan.decoder_work import flops_per_token
from trainer.plan.job import Variant, settled_optimizer
from trainer.plan.messages import Simulated, SimulationAnswer, SimulationRequest
from trainer.plan.outlook import threads_of
from trainer.plan.simulation import Setting, simulate
from trainer.plan.work import Work
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import silence_known_warnings
from trainer.train import build, deferred_modules
from trainer.train.deep import PUBLISHED, data_of
from trainer.train.flops import BACKWARD, sample_of
from trainer.train.optimization import make_optimizer

_CLASSES = ("vocab_size", "num_classes")


def main() -> int:
    """Read the request from stdin, print the answers; returns the exit code."""
    silence_known_warnings()
    request = records.loads(SimulationRequest, sys.stdin.read(), "the request of trainer plan")
    stdout = os.dup(1)
    os.dup2(2, 1)  # output of a data module must not get into the JSON
    answers = simulate_all(request)
    with open(stdout, "w") as stream:
        stream.write(records.dumps(answers))
    return 0


def simulate_all(request: SimulationRequest) -> list[SimulationAnswer]:
    """Return the memory of each variant, or why it has none."""
    variants = request.variants
    trust((request.config.get("security") or {}).get("allow") or ())
    try:
        source = Source(request.config, request.with_data)
    except TrainerError as error:
        return [_refused(error)] * len(variants)
    except Exception as error:  # from user code
        return [_failed(error)] * len(variants)
    answers: list[SimulationAnswer] = []
    if variants[0].device == "cpu":
        bench.ensure(threads_of(variants[0].ranks_of_node))
    for variant in variants:
        variant = replace(variant, micro_batch=source.own_batch or variant.micro_batch)
        try:
            answer = SimulationAnswer(
                simulated=source.simulate(variant),
                micro_batch=variant.micro_batch,
                samples_per_epoch=source.samples_per_epoch,
            )
            answers.append(answer)
        except TrainerError as error:
            answers.append(_refused(error))
        except Exception as error:  # from user code, or an operator that has no fake form
            answers.append(_failed(error))
    return answers


def _refused(error: TrainerError) -> SimulationAnswer:
    return SimulationAnswer(error=Refusal(message=error.message, fix=error.fix))


def _failed(error: Exception) -> SimulationAnswer:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    message = f"the step cannot be simulated: {text}"
    return SimulationAnswer(error=Refusal(message=message, fix="its memory is not known before it runs"))


class _WithoutData:
    """Stands for the data of a job whose command line names a model only."""

    trainer = None

    def __init__(self, plain: dict[str, Any]) -> None:
        self._plain = plain
        self.facts = PUBLISHED

    def default_task(self) -> str:
        """Return the task that the network declares."""
        target = locate(self._plain["model"]["_target_"], "model._target_")
        declared = getattr(target, "for_tasks", ())
        return str(declared[0]) if declared else "trainer.tasks.classification.Classification"

    def steps_per_epoch(self) -> None:
        """Return no length."""

    def batch(self) -> Any:
        """Return a batch of one sample.

        Raises:
            UserError: The shape of a batch does not follow from the model.
        """
        node = self._plain["model"]
        sample = sample_of(
            {key: self.facts.get(key) if value is None else value for key, value in node.items()}, self.facts
        )
        if len(sample) != 1:
            raise UserError("the batches of this model are not known without its data", "add data=...")
        (inputs,) = sample
        return inputs, inputs if inputs.dtype == torch.int64 else torch.zeros(1, dtype=torch.int64)


class Source:
    """The model and the batches of a job, for any of its variants."""

    def __init__(self, plain: dict[str, Any], with_data: bool) -> None:
        self.plain = plain
        if with_data:
            self.data: Any = data_of(plain) if plain["data"].get("_target_") else _own_loaders(plain)
            self.batch = next(iter(self.data.training_loader()))
        else:
            self.data = _WithoutData(plain)
            self.batch = self.data.batch()
        self.samples_per_epoch = self._samples_per_epoch() if with_data else None
        is_own = with_data and plain["data"].get("batch_size") is None
        self.own_batch = _samples(self.batch) if is_own else None
        """Samples of a batch of the module's own loaders, which no option sets."""
        facts = self.data.facts
        known = {**facts, **{key: value for key, value in plain["model"].items() if value is not None}}
        self.classes = next((int(known[key]) for key in _CLASSES if known.get(key)), None)

    def simulate(self, variant: Variant) -> Simulated:
        """Return the memory of a variant."""
        config = to_config({**self.plain, "strategy": variant.strategy})
        config.optimizer = self._optimizer(variant)
        trainer = config.trainer
        setting = Setting(
            STRATEGIES[variant.strategy["name"]](**{k: v for k, v in variant.strategy.items() if k != "name"}),
            variant.world_size,
            variant.ranks_of_node,
            variant.precision,
            variant.device,
            clips=bool(trainer.gradient_clip_norm or trainer.gradient_clip_val),
            accumulates=variant.accumulate > 1,
            classes=self.classes,
        )
        found = simulate(
            lambda: self._module(config), self._batch(variant), lambda one: _optimizer_of(one, config), setting
        )
        return replace(found, work=self._complete(found.work, variant))

    def _complete(self, work: Work, variant: Variant) -> Work:
        """Return the work with what a sample is."""
        facts = self.data.facts
        node = {key: facts.get(key) if value is None else value for key, value in self.plain["model"].items()}
        decoder, tokens = Decoder.of(node), facts.get("sequence_length")
        flops = None
        if decoder is not None:
            length = tokens or decoder.sequence_length
            flops = flops_per_token(decoder, length) * length
        elif work.trained == work.elements:
            flops = (1 + BACKWARD) * work.forward.flops / variant.micro_batch
        return replace(work, samples=variant.micro_batch, tokens=tokens, model_flops=flops)

    def _samples_per_epoch(self) -> int | None:
        steps = self.data.steps_per_epoch()
        return None if steps is None else steps * int(self.data.plan.global_batch)

    def _batch(self, variant: Variant) -> Any:
        """Return the batch with as many samples as a micro-batch has."""
        size = _samples(self.batch)
        if size is None:
            raise UserError("a batch without tensors cannot be simulated", "its memory is not known before it runs")

        def resized(one: torch.Tensor) -> torch.Tensor:
            shape = (variant.micro_batch, *one.shape[1:]) if one.dim() and one.shape[0] == size else one.shape
            return torch.empty(shape, dtype=one.dtype, device="meta")

        return tree_map_only(torch.Tensor, resized, self.batch)

    def _module(self, config: Config) -> LightningModule:
        module = build.build_module(config, self.data, lambda: None)
        if deferred_modules.builds_in_hooks(module):
            deferred_modules.run_build_hooks(module, self.data.trainer or build.plain_trainer())
        if not module.automatic_optimization:
            problem = f"{type(module).__name__} optimizes manually: its step cannot be simulated"
            raise UserError(problem, "its memory is not known before it runs")
        for name in ("log", "log_dict"):  # which need a running loop
            setattr(module, name, lambda *arguments, **named: None)
        step = module.training_step
        if "batch_idx" not in inspect.signature(step).parameters and len(inspect.signature(step).parameters) == 1:
            module.training_step = lambda batch, batch_idx: step(batch)  # type: ignore[method-assign, misc]
        return module.train()

    def _optimizer(self, variant: Variant) -> dict[str, Any]:
        """Return the section `optimizer` with the kernels of the planned device, which torch chooses by itself."""
        node = settled_optimizer(self.plain, variant)
        chosen = {"fused", "foreach"} & {key for key, value in node.items() if value is not None}
        if variant.device == "cuda" and not chosen and node.get("_target_"):
            with contextlib.suppress(UserError):
                if accepts(locate(node["_target_"], "optimizer._target_"), "foreach"):
                    node["foreach"] = True
        return node


def _samples(batch: Any) -> int | None:
    """Return the first dimension of the first tensor of a batch; None: it has no tensors."""
    tensors = [one for one in tree_leaves(batch) if isinstance(one, torch.Tensor) and one.dim()]
    return int(tensors[0].shape[0]) if tensors else None


def _own_loaders(plain: dict[str, Any]) -> Any:
    """Return the data of a job whose module has the loaders; its parameters are on the meta device meanwhile."""
    config = to_config({**plain, "strategy": {"name": "single"}})
    data = build.build_data(config, Rank(0, 0, 1, 1, attempt=0), build.plain_trainer())
    with torch.device("meta"):
        module = build.build_module(config, data, lambda: None)
    data.set_up(module)
    return data


def _optimizer_of(module: LightningModule, config: Config) -> Any:
    """Return the optimizer: the configured one, or the first of the module's own."""
    own = type(module).configure_optimizers is not LightningModule.configure_optimizers
    if not own or not is_overridden("configure_optimizers", module, LightningModule):
        return make_optimizer(module, config)
    made: Any = module.configure_optimizers()
    while isinstance(made, (list, tuple)):
        made = made[0] if made else None
    return made.get("optimizer") if isinstance(made, dict) else made
