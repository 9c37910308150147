"""Lightning's own names under `trainer`: the same batches, validations, steps and weights as its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from tests.train import recorded
from tests.train.in_process import attempt, fit, new_run, weights
from trainer.runs.directory import RunDirectory

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance\\(treespec, LeafSpec\\)",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:The `srun` command",
    "ignore:You are overfitting",
    "ignore:Detected call of `lr_scheduler.step",
    "ignore:`precision=.* is supported for historical reasons",
)
MODULES = ["model=net", "data=rows"]

CASES: dict[str, dict[str, Any]] = {
    "fraction": {"val_check_interval": 0.25},
    "uneven-fraction": {"val_check_interval": 0.3},
    "one-is-an-epoch": {"val_check_interval": 1.0},
    "every-batches": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "in-each-epoch": {"val_check_interval": 5, "check_val_every_n_epoch": 1},
    "every-second-epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "fraction-every-second-epoch": {"check_val_every_n_epoch": 2, "val_check_interval": 0.5},
    "train-batches": {"limit_train_batches": 5},
    "train-fraction": {"limit_train_batches": 0.3},
    "train-limit-and-fraction-of-it": {"limit_train_batches": 0.5, "val_check_interval": 0.5},
    "more-than-there-are": {"limit_train_batches": 500},
    "val-batches": {"limit_val_batches": 2},
    "val-fraction": {"limit_val_batches": 0.5},
    "no-validation": {"limit_val_batches": 0},
    "whole-fractions": {"limit_train_batches": 1.0, "limit_val_batches": 1.0},
    "accumulation": {"accumulate_grad_batches": 3},
    "accumulation-and-fraction": {"accumulate_grad_batches": 2, "val_check_interval": 0.5},
    "clip-by-norm": {"gradient_clip_val": 0.05},
    "clip-by-value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "no-clip": {"gradient_clip_val": 0.0},
    "no-limit-of-epochs": {"max_epochs": -1, "max_steps": 17},
    "no-limit-of-steps": {"max_steps": -1},
    "sanity": {"num_sanity_val_steps": 2},
    "sanity-of-all": {"num_sanity_val_steps": -1},
    "fast-dev-run": {"fast_dev_run": True},
    "fast-dev-run-of-three": {"fast_dev_run": 3},
    "overfit": {"overfit_batches": 2},
    "overfit-fraction": {"overfit_batches": 0.25},
    "no-overfit": {"overfit_batches": 0.0},
    "double": {"precision": 64},
    "bfloat16": {"precision": "bf16"},
    "single": {"precision": "32"},
    "anomaly": {"detect_anomaly": True},
    "profiled": {"profiler": "simple"},
    "no-inference-mode": {"inference_mode": False},
    "defaults-written-out": {
        "accumulate_grad_batches": 1,
        "devices": 1,
        "num_nodes": 1,
        "accelerator": "cpu",
        "strategy": "auto",
        "max_steps": -1,
        "precision": None,
        "logger": False,
        "callbacks": None,
        "fast_dev_run": False,
        "overfit_batches": 0.0,
        "check_val_every_n_epoch": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_algorithm": None,
        "deterministic": None,
        "inference_mode": True,
        "use_distributed_sampler": True,
        "barebones": False,
        "plugins": None,
        "sync_batchnorm": False,
        "reload_dataloaders_every_n_epochs": 0,
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with two config groups."""
    folder = tmp_path_factory.mktemp("project")
    for group, option, target in (("model", "net", "Net"), ("model", "plain", "Plain"), ("data", "rows", "Rows")):
        (folder / "conf" / group).mkdir(parents=True, exist_ok=True)
        (folder / "conf" / group / f"{option}.yaml").write_text(f"_target_: tests.train.recorded.{target}\n")
    return folder


def lightnings(options: dict[str, Any], samples: int, callbacks: list[Any] | None = None) -> tuple[list[Any], Any]:
    """What Lightning's Trainer does with these arguments, and the weights."""
    recorded.EVENTS.clear()
    fixed = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    fixed |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 2, "devices": 1}
    module = recorded.Net()
    Trainer(**{**fixed, **options, "callbacks": callbacks}).fit(module, datamodule=recorded.Rows(samples))  # type: ignore[arg-type]
    return list(recorded.EVENTS), module.state_dict()


def ours(options: dict[str, Any], folder: Path, samples: int, *more: str) -> tuple[list[Any], Any]:
    recorded.EVENTS.clear()
    words = {None: "null", True: "true", False: "false"}
    written = {"max_epochs": 2, **options}
    overrides = [
        f"trainer.{key}={words.get(value, value) if value is None or isinstance(value, bool) else value}"
        for key, value in written.items()
    ]
    run, _ = fit(folder, *MODULES, f"data.samples={samples}", *overrides, *more)
    return list(recorded.EVENTS), weights(run)


@pytest.mark.parametrize("name", CASES)
def test_does_what_lightnings_trainer_does(name: str, project: Path) -> None:
    samples = recorded.SAMPLES
    expected, weighed = lightnings(CASES[name], samples)
    events, trained = ours(CASES[name], project, samples)
    assert events == expected
    assert {key: value.tolist() for key, value in trained.items()} == {
        key: value.tolist() for key, value in weighed.items()
    }


@pytest.mark.parametrize("options", [{"min_epochs": 4}, {"min_steps": 30}, {}], ids=str)
def test_early_stopping_waits_for_the_least(options: dict[str, Any], project: Path) -> None:
    stopper = {"monitor": "val_loss", "patience": 1, "min_delta": 100.0}
    options = {**options, "max_epochs": 9}
    expected, _ = lightnings(options, recorded.SAMPLES, [EarlyStopping(**stopper)])  # type: ignore[arg-type]
    given = [f"+callbacks.early_stopping.{key}={value}" for key, value in stopper.items()]
    target = "callbacks.early_stopping={_target_: lightning.pytorch.callbacks.EarlyStopping}"
    events, _ = ours(options, project, recorded.SAMPLES, target, *given)
    assert events == expected


def _steps(events: list[Any]) -> list[Any]:
    return [event for event in events if event[0] in ("train", "val")]


def _train_until(run: RunDirectory, folder: Path, steps: int) -> list[Any]:
    """One more attempt, to so many steps in all; its batches."""
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("max_steps: 1000", f"max_steps: {steps}"))
    recorded.EVENTS.clear()
    attempt(run, folder)
    run.config_path.write_text(text)
    return _steps(recorded.EVENTS)


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        (["trainer.limit_train_batches=5"], 5),
        (["trainer.limit_train_batches=5"], 12),
        (["trainer.limit_train_batches=0.4", "trainer.accumulate_grad_batches=2"], 4),
        (["trainer.overfit_batches=3"], 7),
        (["trainer.val_check_interval=0.25"], 7),
        (["trainer.reload_dataloaders_every_n_epochs=1"], 17),
        (["trainer.num_sanity_val_steps=2", "trainer.check_val_every_n_epoch=2"], 12),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"at-{value}",
)
def test_a_resumed_run_goes_on_with_the_same_batches(options: list[str], stop: int, project: Path) -> None:
    given = [*MODULES, *options, "data.shuffle=true", "trainer.max_epochs=null", "trainer.max_steps=1000"]
    whole, halves = (new_run(project, given) for _ in range(2))
    expected = _train_until(whole, project, 26)
    seen = _train_until(halves, project, stop) + _train_until(halves, project, 26)
    assert seen == expected
    assert {name: value.tolist() for name, value in weights(halves).items()} == {
        name: value.tolist() for name, value in weights(whole).items()
    }


def test_a_limited_epoch_is_followed_by_the_next_epochs_order(project: Path) -> None:
    """Not by the rest of the same order: each epoch begins anew, as in Lightning."""
    events, _ = ours({"limit_train_batches": 4, "max_epochs": 3}, project, 48, "data.shuffle=true")
    whole, _ = ours({"max_epochs": 3}, project, 48, "data.shuffle=true")
    for epoch in range(3):
        begins = [event for event in whole if event[:2] == ("train", epoch)][:4]
        assert [event for event in events if event[:2] == ("train", epoch)] == begins


def test_a_limit_within_a_step_is_rounded_up_to_whole_steps(project: Path) -> None:
    """Lightning takes a smaller last step; here it is whole, and there are as many of them."""
    events, _ = ours({"limit_train_batches": 5, "accumulate_grad_batches": 2, "max_epochs": 1}, project, 48)
    theirs, _ = lightnings({"limit_train_batches": 5, "accumulate_grad_batches": 2, "max_epochs": 1}, 48)
    assert len([event for event in events if event[0] == "train"]) == 6
    assert events[-1] == theirs[-1]


def test_a_profiler_writes_into_the_run(project: Path) -> None:
    run, _ = fit(project, *MODULES, "trainer.profiler=advanced", "trainer.fast_dev_run=1")
    assert list((run.path / "profiler").glob("*profile*"))
