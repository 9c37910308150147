"""The callbacks that ship in conf/callbacks: each beside the trainer's own, and several at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from tests.train import recorded
from tests.train.in_process import fit
from trainer.callbacks import user_callbacks
from trainer.config.compose import compose, group_options
from trainer.core.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance\\(treespec, LeafSpec\\)",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:The `srun` command",
    "ignore:SWA is currently only supported every epoch",
    "ignore:Swapping scheduler",
    "ignore:When using the `ThroughputMonitor`",
)
LOGGED = {
    "lr_monitor": "lr-SGD",
    "gradient_norm": "train/grad_norm",
    "throughput": "device/samples_per_sec",
    "device_stats": "DeviceStatsMonitor",
}
"""Part of the name of a metric that each must have logged."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for group, option, target in (("model", "plain", "Plain"), ("data", "rows", "Rows")):
        (folder / "conf" / group).mkdir(parents=True)
        (folder / "conf" / group / f"{option}.yaml").write_text(f"_target_: tests.train.recorded.{target}\n")
    return folder


def lines(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


@pytest.mark.parametrize("option", group_options([], "callbacks"))
def test_each_trains_and_logs_what_it_is_for(option: str, project: Path) -> None:
    run, _ = fit(
        project,
        "model=plain",
        "data=rows",
        "optimizer=sgd",
        f"callbacks={option}",
        "trainer.max_epochs=3",
        "optimizer.lr=0.01",
        "trainer.log_every_n_steps=4",
    )
    names = {name for line in lines(run) for name in line}
    assert any(LOGGED.get(option, "") in name for name in names), names


def test_the_norm_is_that_of_the_gradients(project: Path) -> None:
    """With a rate of 0 the weights stay, and with them the gradients of a batch."""
    run, _ = fit(
        project,
        "model=plain",
        "data=rows",
        "optimizer=sgd",
        "optimizer.lr=0",
        "scheduler=constant",
        "callbacks=gradient_norm",
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=5",
        "trainer.gradient_clip_norm=0.001",
    )
    module = recorded.Plain()
    batches = list(recorded.Rows().train_dataloader())
    logged = {line["step"]: line["train/grad_norm"] for line in lines(run) if "train/grad_norm" in line}
    assert set(logged) == {5, 10}
    for step, norm in logged.items():
        module.zero_grad()
        inputs, targets = batches[step - 1]
        (module.net(inputs) - targets).square().mean().backward()
        squares = sum(float(parameter.grad.square().sum()) for parameter in module.parameters())
        assert norm == pytest.approx(squares**0.5, rel=1e-5)


def test_several_are_a_list_of_options(workdir: Path, trainer_cli: Callable[..., Any]) -> None:
    chosen = "callbacks=[lr_monitor,gradient_norm,device_stats,throughput,model_summary,timer,ema]"
    assert set(compose([chosen], config_dirs=[]).config["callbacks"]) >= {"lr_monitor", "ema", "timer"}
    done = trainer_cli(
        "fit",
        chosen,
        "tracking=none",
        "resources.gpus=0",
        "resources.cpu_processes=2",
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=5",
        "resilience.max_restarts=0",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (workdir / "runs").iterdir()
    text = (run / "metrics.jsonl").read_text()
    for part in ("lr-AdamW", "train/grad_norm", "DeviceStatsMonitor", "samples_per_sec"):
        assert part in text


def test_early_stopping_without_a_metric_follows_the_validation_loss_and_resumes() -> None:
    node = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": None, "patience": 2}
    (callback,) = user_callbacks.build({"stop": node})
    assert isinstance(callback, EarlyStopping)
    key = callback.state_key
    assert callback._validate_condition_metric({"train_loss": torch.tensor(1.0), "val_loss": torch.tensor(2.0)})
    assert (callback.monitor, callback.patience, callback.state_key) == ("val_loss", 2, key)
    (other,) = user_callbacks.build({"stop": node})
    with pytest.raises(
        UserError, match=r"callbacks\.stop\.monitor is null.*no validation loss was logged, only val_acc"
    ):
        other._validate_condition_metric({"val_acc": torch.tensor(1.0)})  # type: ignore[attr-defined]
    (named,) = user_callbacks.build({"stop": {**node, "monitor": "val_acc"}})
    assert type(named) is EarlyStopping
