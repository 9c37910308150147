"""What the worker refuses, and the configuration alone decides, `check` refuses: each side is asked about the same."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.connectors.callback_connector import _validate_callbacks_list
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.config.instantiate import instantiate
from trainer.config.strategy import STRATEGIES
from trainer.core.errors import TrainerError

CALLBACKS = "lightning.pytorch.callbacks"


@pytest.fixture(scope="module")
def quickstart() -> dict[str, Any]:
    return compose(["experiment=quickstart", "resources.gpus=0"], config_dirs=[]).config


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The variables of torchrun, without its processes: a Trainer is built, not run."""
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def job(config: dict[str, Any], ranks: int = 2, **sections: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["resources"]["cpu_processes"] = ranks
    for section, values in sections.items():
        changed[section].update(values)
    return changed


def refusals(config: dict[str, Any]) -> str:
    try:
        check(config, fits=False)
    except TrainerError as error:
        return str(error)
    return ""


BY_THE_CONSTRUCTOR = re.compile(
    r"pruning_fn|pruning_dim|duration|`mode`|[Aa]ccumulation|exclusive|Empty dict|Epoch should|Invalid value|save_top_k"
    r"|swa_|Timer|`verbose`|logging_interval"
)
"""What Lightning's constructors say; anything else is a mistake of this test."""
BAD_ARGUMENTS = [
    ("ModelCheckpoint", {"mode": "best"}),
    ("ModelCheckpoint", {"save_top_k": -2}),
    ("ModelCheckpoint", {"save_top_k": 3}),
    ("ModelCheckpoint", {"every_n_epochs": -1}),
    ("ModelCheckpoint", {"every_n_train_steps": 10, "every_n_epochs": 1}),
    ("EarlyStopping", {"monitor": "val/loss", "mode": "less"}),
    ("LearningRateMonitor", {"logging_interval": "batch"}),
    ("Timer", {"duration": "1h"}),
    ("Timer", {"duration": "00:01:00:00", "interval": "batch"}),
    ("StochasticWeightAveraging", {"swa_lrs": -0.1}),
    ("StochasticWeightAveraging", {"swa_lrs": 1}),
    ("StochasticWeightAveraging", {"swa_lrs": [0.1, -1.0]}),
    ("StochasticWeightAveraging", {"swa_lrs": 0.1, "swa_epoch_start": 0}),
    ("StochasticWeightAveraging", {"swa_lrs": 0.1, "swa_epoch_start": 1.5}),
    ("GradientAccumulationScheduler", {"scheduling": {}}),
    ("GradientAccumulationScheduler", {"scheduling": {-1: 2}}),
    ("GradientAccumulationScheduler", {"scheduling": {0: 0}}),
    ("BatchSizeFinder", {"mode": "slow"}),
    ("LearningRateFinder", {"mode": "slow"}),
    ("ModelPruning", {"pruning_fn": "l7"}),
    ("ModelPruning", {"pruning_fn": "random_structured", "use_global_unstructured": False}),
    ("ModelPruning", {"pruning_fn": "l1_unstructured", "verbose": 3}),
]


@pytest.mark.parametrize(("kind", "arguments"), BAD_ARGUMENTS)
def test_what_a_constructor_refuses(quickstart: dict[str, Any], kind: str, arguments: dict[str, Any]) -> None:
    node = {"_target_": f"{CALLBACKS}.{kind}", **arguments}
    with pytest.raises((MisconfigurationException, TypeError, ValueError), match=BY_THE_CONSTRUCTOR):
        instantiate(copy.deepcopy(node), where="callbacks.mine")
    assert "callbacks.mine" in refusals(job(quickstart, 1, callbacks={"mine": node}))


GOOD = {
    "checkpoint": {"_target_": f"{CALLBACKS}.ModelCheckpoint", "monitor": "val/loss", "save_top_k": 3},
    "periodic": {"_target_": f"{CALLBACKS}.ModelCheckpoint", "every_n_train_steps": 10, "save_top_k": -1},
    "stop": {"_target_": f"{CALLBACKS}.EarlyStopping", "monitor": "val/loss"},
    "stop_too": {"_target_": f"{CALLBACKS}.EarlyStopping", "monitor": "val/acc", "mode": "max"},
    "lr": {"_target_": f"{CALLBACKS}.LearningRateMonitor", "logging_interval": "step"},
    "timer": {"_target_": f"{CALLBACKS}.Timer", "duration": "00:01:00:00"},
    "swa": {"_target_": f"{CALLBACKS}.StochasticWeightAveraging", "swa_lrs": 0.01},
    "schedule": {"_target_": f"{CALLBACKS}.GradientAccumulationScheduler", "scheduling": {0: 1, 5: 2}},
    "prune": {"_target_": f"{CALLBACKS}.ModelPruning", "pruning_fn": "l1_unstructured", "amount": 0.5},
    "find": {"_target_": f"{CALLBACKS}.LearningRateFinder"},
    "bar": {"_target_": f"{CALLBACKS}.TQDMProgressBar"},
}


def test_what_constructors_take_is_not_refused(quickstart: dict[str, Any]) -> None:
    for name, node in GOOD.items():
        instantiate(copy.deepcopy(node), where=f"callbacks.{name}")
    assert refusals(job(quickstart, callbacks=GOOD)) == ""


def test_two_callbacks_of_one_state(quickstart: dict[str, Any]) -> None:
    for kind, arguments in (
        ("ModelCheckpoint", {"monitor": "val/loss"}),
        ("EarlyStopping", {"monitor": "val/loss"}),
        ("Timer", {"duration": "00:01:00:00"}),
        ("StochasticWeightAveraging", {"swa_lrs": 0.1}),
        ("BackboneFinetuning", {}),
        ("EMAWeightAveraging", {}),
    ):
        node = {"_target_": f"{CALLBACKS}.{kind}", **arguments}
        twice = [instantiate(copy.deepcopy(node)) for _ in range(2)]
        with pytest.raises(RuntimeError, match="stateful"):
            _validate_callbacks_list(twice)
        assert "callbacks.a" in refusals(job(quickstart, callbacks={"a": node, "b": node}))
    stateless = {"_target_": f"{CALLBACKS}.LearningRateMonitor"}
    _validate_callbacks_list([instantiate(stateless), instantiate(stateless)])
    assert refusals(job(quickstart, callbacks={"a": stateless, "b": stateless})) == ""


class Module(LightningModule):
    pass


def start(callback: Callback, strategy: Any, accumulate: int = 1, max_epochs: int = 10, ranks: int = 2) -> None:
    """Call the hooks in which Lightning's callbacks look at the job, with stand-ins for it."""
    connector = SimpleNamespace(is_distributed=ranks > 1)
    optimizer = SimpleNamespace(param_groups=[{}])
    trainer: Any = SimpleNamespace(
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        optimizers=[optimizer],
        lr_scheduler_configs=[],
        _accelerator_connector=connector,
    )
    module = Module()
    module.layer = torch.nn.Linear(1, 1)
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)
    callback.on_train_start(trainer, module)


@pytest.mark.parametrize(
    ("kind", "arguments", "sections", "facts"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 0.1}, {"strategy": "deepspeed_zero2"}, {}),
        (
            "StochasticWeightAveraging",
            {"swa_lrs": 0.1},
            {"trainer": {"max_epochs": None, "max_steps": 9}},
            {"max_epochs": -1},
        ),
        ("GradientAccumulationScheduler", {"scheduling": {0: 2}}, {"strategy": "deepspeed_zero2"}, {}),
        (
            "GradientAccumulationScheduler",
            {"scheduling": {0: 2}},
            {"data": {"batch_size": 32, "micro_batch": 4}},
            {"accumulate": 4},
        ),
    ],
)
def test_what_a_callback_refuses_of_the_job(
    quickstart: dict[str, Any], kind: str, arguments: dict[str, Any], sections: dict[str, Any], facts: dict[str, Any]
) -> None:
    node = {"_target_": f"{CALLBACKS}.{kind}", **arguments}
    deepspeed = sections.get("strategy")
    strategy = object.__new__(DeepSpeedStrategy) if deepspeed else object()
    with pytest.raises(Exception, match=r"distributed|sharded|max_epochs|accumulate_grad_batches"):
        start(instantiate(copy.deepcopy(node)), strategy, **facts)
    config = job(quickstart, callbacks={"mine": node}, **{k: v for k, v in sections.items() if k != "strategy"})
    if deepspeed:
        config["strategy"] = vars(STRATEGIES[deepspeed]())
    assert "callbacks.mine" in refusals(config)
    one_rank = job(quickstart, 1, callbacks={"mine": node})
    assert refusals(one_rank) == ""


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "tp", "deepspeed_zero3"])
@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "ModelPruning", "LearningRateFinder", "ModelCheckpoint"])
def test_callbacks_that_cannot_have_shards(quickstart: dict[str, Any], strategy: str, kind: str) -> None:
    """Seen on two ranks: copies of parameters on the meta device, operators that DTensor does not have."""
    arguments = {"pruning_fn": "l1_unstructured"} if kind == "ModelPruning" else {}
    config = job(quickstart, callbacks={"mine": {"_target_": f"{CALLBACKS}.{kind}", **arguments}})
    config["strategy"] = vars(STRATEGIES[strategy]())
    assert ("callbacks.mine" in refusals(config)) is (kind != "ModelCheckpoint")


def test_networks_that_tensor_parallel_cannot_split(quickstart: dict[str, Any]) -> None:
    """Ours, each made without memory: which of them has a layer that says how it is split."""
    facts = {"input_shape": (1, 32, 32), "num_classes": 10, "vocab_size": 50, "sequence_length": 16}
    refused = 0
    for option in ("mlp", "resnet_small", "vgg_small", "vit_small", "efficientnet_lite0", "rnn_text", "transformer"):
        node = compose([f"model={option}", "resources.gpus=0"], config_dirs=[]).config["model"]
        given = {key: facts.get(key) if value is None else value for key, value in node.items()}
        with torch.device("meta"):
            network = instantiate(given, where="model")
        splits = any(hasattr(part, "tensor_parallel") for part in network.modules())
        config = {**job(quickstart, 2), "model": node, "strategy": vars(STRATEGIES["tp"]())}
        assert ("strategy=tp" in refusals(config)) is not splits, option
        one = {**config, "strategy": vars(STRATEGIES["tp"](tensor_parallel_size=1))}
        assert "strategy=tp" not in refusals(one)
        refused += not splits
    assert refused == 6


def test_packages_that_are_missing(quickstart: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.config.combinations.find_spec", lambda name: None)
    for kind, package in (("RichProgressBar", "rich"), ("RichModelSummary", "rich"), ("DeviceStatsMonitor", "psutil")):
        told = refusals(job(quickstart, callbacks={"mine": {"_target_": f"{CALLBACKS}.{kind}"}}))
        assert f"callbacks.mine needs the package {package}" in told
        assert "callbacks.mine=null" in told
    assert "peft" in refusals(job(quickstart, finetune={"lora_rank": 4}))
    small = {"_target_": "trainer.optimizers.LowMemoryAdamW", "states": "8bit"}
    quickstart = {**quickstart, "optimizer": small}
    assert "pip install 'torchao>=0.16,<1', or optimizer=adamw_bf16" in refusals(job(quickstart))
    assert refusals(job(quickstart, optimizer={"states": "bfloat16"})) == ""
