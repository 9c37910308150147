"""Lightning's names under `trainer`, on the command line and in files: their translation and refusal."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from trainer.config.compose import compose
from trainer.config.lightning_names import TAKEN, WRITE
from trainer.config.schema import TrainerOptions
from trainer.config.typed import key_names
from trainer.core.errors import UserError


def composed(*overrides: str) -> dict[str, Any]:
    return compose(list(overrides), config_dirs=[]).config


def value_of(config: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("trainer.max_epochs=-1 trainer.max_steps=9", {"trainer.max_epochs": None, "trainer.max_steps": 9}),
        ("trainer.max_steps=9", {"trainer.max_epochs": None, "trainer.max_steps": 9}),
        ("trainer.max_steps=9 trainer.max_epochs=3", {"trainer.max_epochs": 3, "trainer.max_steps": 9}),
        ("trainer.max_steps=-1", {"trainer.max_epochs": 10, "trainer.max_steps": None}),
        ("trainer.max_time=00:00:05:00", {"trainer.max_epochs": None}),
        ("trainer.precision=16", {"trainer.precision": "16-mixed"}),
        ("trainer.precision=bf16", {"trainer.precision": "bf16-mixed"}),
        ("trainer.precision=32", {"trainer.precision": "32-true"}),
        ("trainer.precision=64", {"trainer.precision": "64-true"}),
        ("trainer.gradient_clip_val=0.5", {"trainer.gradient_clip_norm": 0.5, "trainer.gradient_clip_val": None}),
        ("trainer.gradient_clip_val=0", {"trainer.gradient_clip_norm": None}),
        (
            "trainer.gradient_clip_val=0.5 trainer.gradient_clip_algorithm=norm trainer.gradient_clip_norm=0.5",
            {"trainer.gradient_clip_norm": 0.5, "trainer.gradient_clip_algorithm": None},
        ),
        (
            "trainer.gradient_clip_val=0.5 trainer.gradient_clip_algorithm=value",
            {"trainer.gradient_clip_norm": None, "trainer.gradient_clip_val": 0.5},
        ),
        ("trainer.accelerator=cpu", {"resources.gpus": 0, "resources.cpu_processes": 1}),
        ("trainer.accelerator=cpu trainer.devices=3", {"resources.gpus": 0, "resources.cpu_processes": 3}),
        ("trainer.accelerator=cpu trainer.devices=auto", {"resources.cpu_processes": 1}),
        ("trainer.accelerator=cpu resources.cpu_processes=2", {"resources.cpu_processes": 2}),
        ("trainer.devices=2 resources.gpus=0", {"resources.cpu_processes": 2}),
        ("trainer.accelerator=gpu trainer.devices=4", {"resources.gpus_per_node": 4, "resources.gpus": None}),
        ("trainer.accelerator=cuda trainer.devices='4'", {"resources.gpus_per_node": 4}),
        ("trainer.accelerator=gpu trainer.devices=2 trainer.num_nodes=3", {"resources.nodes": 3}),
        ("trainer.accelerator=cpu trainer.devices=2 trainer.num_nodes=3", {"resources.cpu_processes": 6}),
        ("trainer.val_check_interval=1.0", {"trainer.val_check_interval": 1.0}),
        ("trainer.val_check_interval=0.25", {"trainer.val_check_interval": 0.25}),
        ("trainer.limit_val_batches=0.5", {"trainer.limit_val_batches": 0.5}),
        ("trainer.limit_train_batches=10", {"trainer.limit_train_batches": 10}),
        ("trainer.overfit_batches=0.0", {"trainer.overfit_batches": None}),
        (
            "trainer.fast_dev_run=true",
            {"trainer.max_steps": 1, "trainer.limit_val_batches": 1, "tracking.name": "none"},
        ),
        ("trainer.fast_dev_run=5", {"trainer.max_steps": 5, "trainer.max_epochs": 1, "trainer.limit_train_batches": 5}),
        ("trainer.fast_dev_run=false", {"trainer.max_epochs": 10, "tracking.name": "wandb"}),
        ("trainer.max_time={hours: 25, minutes: 3}", {"trainer.max_time": "01:01:03:00"}),
        ("trainer.logger=false", {"tracking.name": "none"}),
        ("trainer.strategy=ddp", {"strategy.name": "ddp"}),
        ("trainer.strategy=fsdp strategy=fsdp", {"strategy.name": "fsdp"}),
        ("trainer.strategy=auto", {"strategy.name": "ddp"}),
        ("trainer.deterministic=warn", {"trainer.deterministic": "warn"}),
        ("trainer.num_sanity_val_steps=2", {"trainer.num_sanity_val_steps": 2}),
        ("trainer.log_every_n_steps=null", {"trainer.log_every_n_steps": 10}),
        ("trainer.default_root_dir=/tmp/out", {"trainer.default_root_dir": "/tmp/out"}),
        ("+trainer._target_=lightning.pytorch.trainer.Trainer", {"trainer.max_epochs": 10}),
        ("trainer._target_=pytorch_lightning.Trainer", {"trainer.max_epochs": 10}),
        (
            "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelSummary, max_depth: 2}]",
            {"callbacks.model_summary.max_depth": 2},
        ),
        (
            "trainer.logger={_target_: lightning.pytorch.loggers.CSVLogger, name: a}",
            {"logger.csvlogger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "a"}},
        ),
        (
            "trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: a}}]",
            {"callbacks.early_stopping": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "a"}},
        ),
    ],
)
def test_lightning_names_keep_their_meaning(given: str, means: dict[str, Any], workdir: Path) -> None:
    config = composed(*overrides_of(given))
    assert {key: value_of(config, key) for key in means} == means
    assert not set(TAKEN) & set(config["trainer"])


def overrides_of(given: str) -> list[str]:
    """Split at spaces that precede a key."""
    return re.split(r" (?=[+~]?[a-z_]+(?:\.[a-z_]+)*=)", given)


@pytest.mark.parametrize(
    ("given", "problem", "fix"),
    [
        ("trainer.devices=[0,1]", "trainer.devices=[0, 1]", "resources.devices=[0,1]"),
        ("trainer.devices='1,3'", "trainer.devices=1,3", "resources.devices=[1,3]"),
        ("trainer.devices=0", "at least one", "trainer.devices=1"),
        ("trainer.accelerator=tpu", "trainer.accelerator=tpu", "trainer.accelerator=gpu"),
        (
            "trainer.accelerator=cpu trainer.devices=2 resources.cpu_processes=4",
            "contradict",
            "cpu_processes=2",
        ),
        ("trainer.num_nodes=2 resources.nodes=4", "contradict", "resources.nodes=2"),
        ("trainer.devices=4 cluster=slurm_example", "GPUs or CPU", "resources.gpus_per_node=4"),
        ("trainer.accelerator=gpu cluster=slurm_example", "without a number", "resources.gpus_per_node=8"),
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp", "write strategy=fsdp instead"),
        ("trainer.strategy=ddp_find_unused_parameters_true", "strategy", "strategy.find_unused_parameters=true"),
        ("trainer.strategy=deepspeed_stage_3_offload", "strategy", "strategy=deepspeed_zero3 strategy.offload_optim"),
        ("trainer.strategy=dp", "unknown strategy", "ddp"),
        (
            "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, bucket_cap_mb: 50}",
            "DDPStrategy",
            "strategy=ddp strategy.bucket_cap_mb=50",
        ),
        ("trainer.gradient_clip_val=1 trainer.gradient_clip_norm=2", "the same option", "trainer.gradient_clip_norm=1"),
        (
            "trainer.gradient_clip_val=1 trainer.gradient_clip_norm=1 trainer.gradient_clip_algorithm=value",
            "are both set",
            "trainer.gradient_clip_norm=null",
        ),
        ("trainer.accumulate_grad_batches={0: 2, 4: 8}", "callback", "GradientAccumulationScheduler"),
        ("trainer.val_check_interval='00:01:00:00'", "trainer.val_check_interval=", "optimizer steps"),
        ("trainer.precision=transformer-engine", "Transformer Engine", "trainer.precision=bf16-mixed"),
        ("trainer.enable_checkpointing=false", "trainer.enable_checkpointing=false", "checkpoint.every_minutes=null"),
        ("trainer.barebones=true", "trainer.barebones=true", "tracking=none"),
        ("trainer.plugins=[x]", "trainer.plugins: x", "trainer.precision="),
        ("trainer.model_registry=x", "trainer.model_registry=x", "finetune.init_from=PATH"),
        ("trainer.logger=csv", "trainer.logger=csv", "write logger=csv"),
        ("trainer.profiler={_target_: lightning.pytorch.profilers.PyTorchProfiler}", "profiler", "profiler=pytorch"),
        ("trainer._target_=mine.MyTrainer", "mine.MyTrainer", "callbacks.NAME._target_"),
        ("trainer.gpus=4", "trainer.gpus=4", "write resources.gpus_per_node=4"),
        ("+trainer.gradient_accumulation_steps=4", "trainer.gradient", "write trainer.accumulate_grad_batches=4"),
        ("trainer.resume_from_checkpoint=a.ckpt", "trainer.resume_from", "finetune.init_from=a.ckpt"),
        ("trainer.devics=2", "trainer.devics=2", "did you mean trainer.devices?"),
        ("trainer.limit_trian_batches=2", "trainer.limit_trian", "did you mean trainer.limit_train_batches?"),
    ],
)
def test_refused_names_come_with_a_replacement(given: str, problem: str, fix: str, workdir: Path) -> None:
    with pytest.raises(UserError) as caught:
        composed(*overrides_of(given))
    assert problem in caught.value.message
    assert fix in caught.value.fix


def test_every_argument_of_lightnings_trainer_is_known() -> None:
    """Otherwise did-you-mean would suggest a key with another meaning."""
    from lightning.pytorch import Trainer

    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert arguments <= set(key_names(TrainerOptions)) | set(TAKEN)
    assert not set(TAKEN) & set(key_names(TrainerOptions))
    assert not set(WRITE) & (set(key_names(TrainerOptions)) | set(TAKEN))


DDP_YAML = """
defaults:
  - default
strategy: ddp
accelerator: cpu
devices: 2
num_nodes: 1
sync_batchnorm: True
"""
DEFAULT_YAML = """
_target_: lightning.pytorch.trainer.Trainer
default_root_dir: out
min_epochs: 1
max_epochs: 7
accelerator: auto
devices: 1
check_val_every_n_epoch: 1
deterministic: False
"""


def test_a_trainer_group_as_in_the_template(workdir: Path) -> None:
    (workdir / "conf/trainer").mkdir(parents=True)
    (workdir / "conf/trainer/default.yaml").write_text(DEFAULT_YAML)
    (workdir / "conf/trainer/ddp.yaml").write_text(DDP_YAML)
    config = composed("trainer=ddp", "trainer.min_epochs=2")
    trainer, resources = config["trainer"], config["resources"]
    assert (trainer["max_epochs"], trainer["min_epochs"], trainer["sync_batchnorm"]) == (7, 2, True)
    assert (resources["gpus"], resources["cpu_processes"], resources["nodes"]) == (0, 2, 1)
    assert composed("trainer=default", "resources.gpus=0")["resources"]["cpu_processes"] == 1


def test_every_mistake_in_a_file_is_reported(workdir: Path) -> None:
    (workdir / "conf/experiment").mkdir(parents=True)
    (workdir / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ntrainer:\n  gpus: 2\n  strategy: fsdp\n  batch_size: 8\n  nonsense: 1\n"
    )
    with pytest.raises(UserError) as caught:
        composed("experiment=mine")
    text = str(caught.value)
    for line in ("resources.gpus_per_node=2", "strategy=fsdp", "data.batch_size=8", "trainer.nonsense"):
        assert line in text


def test_a_full_dump_of_lightning_cli_changes_nothing(workdir: Path) -> None:
    """It has every argument with its default, including null."""
    from lightning.pytorch import Trainer

    (workdir / "conf/trainer").mkdir(parents=True)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(Trainer.__init__).parameters.items()
        if name not in ("self", "max_epochs", "log_every_n_steps")
    }
    (workdir / "conf/trainer/full.yaml").write_text(json.dumps(defaults))
    expected = composed("resources.gpus=0", "resources.nodes=1")
    expected["trainer"] |= {"check_val_every_n_epoch": 1, "accumulate_grad_batches": 1}
    config = composed("trainer=full", "resources.gpus=0")
    assert config["trainer"] == expected["trainer"]
    assert {**config, "name": expected["name"]} == expected
