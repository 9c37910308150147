"""Every pair of strategy, precision, optimizer and the rest: `check` refuses what real ranks refuse, and no more."""

from __future__ import annotations

import copy
import itertools
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from trainer.checks.config import check
from trainer.config.combinations import Job, problems_of_combinations
from trainer.config.compose import compose, group_options
from trainer.config.strategy import STRATEGIES
from trainer.core.errors import TrainerError

RANKS = Path(__file__).parents[1] / "distributed" / "pair_ranks.py"
NAMES = [name for name in STRATEGIES if name not in ("auto", "single")]
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
OPTIMIZERS = tuple(group_options([], "optimizer"))
FSDP, ZERO = ("fsdp", "hsdp", "tp"), ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
SWA = {"swa_lrs": 0.1, "swa_epoch_start": 1}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {"trainer": {"gradient_clip_norm": 0.5}},
    "clip by value": {"trainer": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}},
    "accumulate": {"data": {"batch_size": 8, "micro_batch": 2}},
    "full": {"strategy": {"activation_checkpointing": "full"}},
    "selective": {"strategy": {"activation_checkpointing": "selective"}},
    "cpu_offload": {"strategy": {"cpu_offload": True}},
    "offload_optimizer": {"strategy": {"offload_optimizer": "cpu"}},
    "nvme": {"strategy": {"offload_optimizer": "nvme"}},
    "fused": {"optimizer": {"fused": True}},
    "fused clip": {"optimizer": {"fused": True}, "trainer": {"gradient_clip_norm": 0.5}},
}
"""The rest of a job: sections to their values."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "gradient_sync": {"strategy": {"gradient_sync": "step"}, "data": {"batch_size": 8, "micro_batch": 2}},
    "reduce in bf16": {"strategy": {"reduce_dtype": "bfloat16"}, "trainer": {"precision": "bf16-mixed"}},
    "gather in fp32": {"strategy": {"param_dtype": "float32"}, "trainer": {"precision": "bf16-mixed"}},
    "keep gathered": {"strategy": {"reshard_after_forward": False}},
    "build whole": {"strategy": {"defer_parameters": False}},
    "bf16 hook": {"strategy": {"comm_hook": "bf16_compress"}},
    "fp16 hook clip": {"strategy": {"comm_hook": "fp16_compress"}, "trainer": {"gradient_clip_norm": 0.5}},
    "buffers": {"strategy": {"broadcast_buffers": "always"}},
    "sequence": {"strategy": {"sequence_parallel": True}},
    "loss": {"strategy": {"loss_parallel": True}, "model": {"tied": False}},
    "offload_parameters": {"strategy": {"offload_parameters": "cpu"}},
    "float8": {"trainer": {"float8": "tensorwise", "precision": "bf16-mixed"}},
    "float8 rowwise": {"trainer": {"float8": "rowwise", "precision": "bf16-mixed"}},
    "channels_last": {"trainer": {"channels_last": True}},
    "no prefetch": {"trainer": {"prefetch_to_device": False}},
    "deterministic": {"trainer": {"deterministic": True}},
    "documents": {"data": {"document_mask": True}},
    "all logits": {"task": {"_target_": "trainer.tasks.language_modelling.LanguageModelling", "chunked_loss": False}},
    "decay": {"optimizer": {"decay": "matrices", "weight_decay": 0.1}},
    "ema": {"callbacks": {"ema": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging"}}},
    "swa": {"callbacks": {"swa": {"_target_": "lightning.pytorch.callbacks.StochasticWeightAveraging", **SWA}}},
}
"""What a job may have beside them; tried with each strategy, not with each optimizer."""

REFUSED: set[tuple[str, str]] = {
    *((name, precision) for name in FSDP for precision in ("16-mixed", "64-true")),
    *((name, "64-true") for name in ZERO),
    *((name, precision) for name in ZERO for precision in ("16-mixed on CPU", "16-true on CPU")),
    *((name, "adafactor") for name in FSDP),
    *((name, "lbfgs") for name in ("ddp", *FSDP, *ZERO)),
    *((name, "muon") for name in ZERO),
    *((name, "adamw_8bit") for name in ("tp", *ZERO)),
    *((name, "clip by value") for name in ZERO),
    *((name, "nvme") for name in ("deepspeed_zero1", "deepspeed_zero2")),
    *((name, part) for name in ("tp", *ZERO) for part in ("float8", "float8 rowwise")),
    *((name, part) for name in (*FSDP, *ZERO) for part in ("channels_last", "swa")),
    *((name, "ema") for name in (*FSDP, "deepspeed_zero3")),
    ("tp", "batch norm"),
}
"""All refused pairs of a strategy with something else."""
SILENT = {
    *((name, "channels_last") for name in (*FSDP, *ZERO)),
    *((name, part) for name in ("tp", *ZERO) for part in ("float8", "float8 rowwise")),
    *((name, "adamw_8bit") for name in ("tp", *ZERO)),
    *((name, "nvme") for name in ("deepspeed_zero1", "deepspeed_zero2")),
}
"""Refused because the ranks would train, but without the effect that the option promises."""
HANGS = {(name, "lbfgs") for name in ("ddp", *FSDP, *ZERO)}
"""Refused because the ranks decide differently how often to evaluate the loss, and then wait for each other forever."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A tiny language model with each optimizer, and a network with batch normalization."""
    root = tmp_path_factory.mktemp("text")
    (root / "some.txt").write_text("a few words to learn " * 100)
    given = [
        "model=transformer",
        "data=text",
        f"data.root={root}",
        "data.patterns=['*.txt']",
        "data.sequence_length=16",
        "resources.gpus=0",
        "resources.cpu_processes=2",
        "tracking=none",
        "scheduler=constant",
        "trainer.max_epochs=null",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        "data.batch_size=4",
        "data.micro_batch=null",
        "model.dim=64",
        "model.layers=2",
        "model.heads=2",
    ]
    found = {
        name: compose([*given, f"optimizer={name}", "trainer.precision=32-true"], config_dirs=[]).config
        for name in OPTIMIZERS
    }
    images = [one for one in given if not one.startswith(("model", "data"))]
    images += ["model=resnet_small", "data=digits", "data.batch_size=4", "optimizer=adamw", "trainer.precision=32-true"]
    return {**found, "batch norm": compose(images, config_dirs=[]).config}


def job(
    bases: dict[str, dict[str, Any]],
    strategy: str,
    precision: str = "32-true",
    optimizer: str = "adamw",
    more: str | None = None,
) -> dict[str, Any] | None:
    """A configuration; None if the strategy or the optimizer has no such option."""
    config = copy.deepcopy(bases[optimizer])
    config["strategy"] = vars(STRATEGIES[strategy]())
    config["trainer"]["precision"] = precision
    for section, values in ({**MORE, **OTHERS}[more] if more else {}).items():
        if section == "strategy" and not values.keys() <= config["strategy"].keys():
            return None
        if section == "optimizer" and optimizer not in ("adamw", "adam", "sgd"):
            return None
        config[section].update(values)
    return config


def refusals(config: dict[str, Any], *, on_gpu: bool) -> list[str]:
    from trainer.config.schedule import problems_of_optimizer

    problems = [*problems_of_combinations(Job(config, 2, 2, on_gpu)), *problems_of_optimizer(config)]
    return [problem.message for problem in problems]


def test_the_verdict_of_every_pair_is_pinned(bases: dict[str, dict[str, Any]]) -> None:
    found = set()
    for name, (precision, on_gpu) in itertools.product(NAMES, itertools.product(PRECISIONS, (False, True))):
        config = job(bases, name, precision)
        assert config is not None
        if refusals(config, on_gpu=on_gpu):
            found.add((name, precision, on_gpu))
    both = {(name, precision) for name, precision, on_gpu in found if (name, precision, not on_gpu) in found}
    on_cpu = {(name, f"{precision} on CPU") for name, precision, on_gpu in found if (name, precision) not in both}
    pairs = both | on_cpu
    for name, other in itertools.product(NAMES, (*bases, *MORE, *OTHERS)):
        config = job(bases, name, optimizer=other) if other in bases else job(bases, name, more=other)
        if config is not None and refusals(config, on_gpu=True):
            pairs.add((name, other))
    assert pairs == REFUSED


def test_a_job_is_refused_if_and_only_if_a_part_of_it_is(bases: dict[str, dict[str, Any]]) -> None:
    """The whole product, on GPUs and on CPU: 6,720 jobs. A refused pair is refused whatever the rest is."""
    triples = {("16-mixed", "fused clip"), ("16-mixed", "lbfgs")}
    triples |= {("64-true", name) for name in OPTIMIZERS if name in ("muon", "adamw_8bit", "adamw_bf16")}
    count = 0
    for name, precision, optimizer, more, on_gpu in itertools.product(
        NAMES, PRECISIONS, OPTIMIZERS, (None, *MORE), (False, True)
    ):
        config = job(bases, name, precision, optimizer, more)
        if config is None:
            continue
        count += 1
        expected = {(name, part) for part in (precision, optimizer, more)} & REFUSED
        expected |= {(precision, part) for part in (optimizer, more)} & triples
        if not on_gpu:
            expected |= {(name, f"{precision} on CPU")} & REFUSED
        offloads = more == "cpu_offload" and optimizer in ("muon", "adamw_8bit") and on_gpu
        no_kernel = name in FSDP and optimizer == "sgd" and more in ("fused", "fused clip")
        found = bool(refusals(config, on_gpu=on_gpu))
        assert found == bool(expected or offloads or no_kernel), (name, precision, optimizer, more)
    assert count > 6000


def test_states_of_another_type_are_refused_not_taken_for_fp32(bases: dict[str, dict[str, Any]]) -> None:
    config = job(bases, "ddp", optimizer="adamw_8bit")
    assert config is not None
    for states, problems in (("4bit", ["optimizer.states=4bit: invalid choice"]), ("float32", [])):
        config["optimizer"]["states"] = states
        assert refusals(config, on_gpu=True) == problems


def cases(bases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The refused pairs, and accepted ones that no other test trains. All pairs with TRAINER_ALL_PAIRS=1."""
    more = itertools.product(("fsdp", "tp", "deepspeed_zero3"), ("fused", "adamw_bf16", "adamw_8bit", "muon", "sgd"))
    others = ("fsdp float8", "hsdp sequence", "tp sequence", "tp loss", "ddp ema", "ddp swa", "ddp fp16 hook clip")
    others += (
        "hsdp reduce in bf16",
        "deepspeed_zero3 offload_parameters",
        "deepspeed_zero2 documents",
        "tp gather in fp32",
    )
    refused = {(name, part.removesuffix(" on CPU")) for name, part in REFUSED}
    pairs = {*refused, *more, *((name, part) for name, _, part in (one.partition(" ") for one in others))}
    if os.environ.get("TRAINER_ALL_PAIRS"):
        pairs = {*itertools.product(NAMES, (*PRECISIONS, *OPTIMIZERS, *MORE, *OTHERS))}
    named = {(name, part, "32-true") for name, part in pairs - HANGS}
    named |= {(name, "batch norm", precision) for name in NAMES for precision in ("bf16-mixed", "bf16-true")}
    found = {}
    for name, part, precision in sorted(named):
        if find_spec("torchao") is None and part in ("adamw_8bit", "float8", "float8 rowwise"):
            continue
        config = job(
            bases,
            name,
            part if part in PRECISIONS else precision,
            part if part in bases else "adamw",
            part if part in MORE or part in OTHERS else None,
        )
        if config is not None:
            found[f"{name} {part}" + (f" {precision}" if part == "batch norm" else "")] = config
    return found


def test_two_real_ranks_agree(bases: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Each pair is built and trained for a step by two gloo ranks, refused or not."""
    jobs = cases(bases)
    configs, verdicts = tmp_path / "configs.json", tmp_path / "verdicts.json"
    configs.write_text(json.dumps(list(jobs.values())))
    run_ranks(2, RANKS, [str(configs), str(verdicts)], tmp_path, max(120.0, 4.0 * len(jobs)))
    wrong = {}
    for (name, config), error in zip(jobs.items(), json.loads(verdicts.read_text()), strict=True):
        try:
            check(config, fits=False)
            refused = ""
        except TrainerError as problem:
            refused = str(problem)
        if bool(refused) != bool(error):
            wrong[name] = refused.splitlines()[0] if refused else error
    expected = {f"{name} {part}" for name, part in SILENT}
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # DeepSpeed trains in fp16 on these processors only
        expected |= {name for name in wrong if name.startswith("deepspeed") and name.split()[1].startswith("16-")}
    assert sorted(wrong) == sorted(expected & jobs.keys()), wrong
