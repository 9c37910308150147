"""The keys of `scheduler` and `optimizer` that the trainer reads itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core.errors import UserError

TORCHS = "torch.optim.lr_scheduler"
NO_LIMIT = ["trainer.max_epochs=null", "trainer.max_time=00:00:01:00"]


@pytest.fixture
def job(workdir: Path) -> Any:
    """Compose and check a job with a user's scheduler file."""
    folder = workdir / "conf/scheduler"
    folder.mkdir(parents=True)

    def composed(text: str, *overrides: str) -> dict[str, Any]:
        (folder / "mine.yaml").write_text(text)
        config = compose(["resources.gpus=0", "scheduler=mine", *overrides], config_dirs=[]).config
        check(config)
        return config

    return composed


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        (f"_target_: {TORCHS}.StepLR\nstep_size: 1", "epoch"),
        (f"_target_: {TORCHS}.CosineAnnealingLR", "epoch"),
        (f"_target_: {TORCHS}.ReduceLROnPlateau", "epoch"),
        (f"_target_: {TORCHS}.ExponentialLR\ngamma: 0.9\ninterval: step", "step"),
        (f"_target_: {TORCHS}.OneCycleLR\nmax_lr: 0.1", "step"),
        (f"_target_: {TORCHS}.CyclicLR\nbase_lr: 0.1\nmax_lr: 1", "step"),
        ("_target_: trainer.schedules.cosine", "step"),
    ],
)
def test_the_default_interval_depends_on_the_class(text: str, interval: str, job: Any) -> None:
    assert job(text)["scheduler"]["interval"] == interval


@pytest.mark.parametrize(
    "text",
    [
        f"_target_: {TORCHS}.ReduceLROnPlateau\nmonitor: val_loss\nstrict: false\nfrequency: 2\nname: lr",
        f"_target_: {TORCHS}.ChainedScheduler\nschedulers:\n- _target_: {TORCHS}.ExponentialLR\n  gamma: 0.9",
        f"_target_: {TORCHS}.SequentialLR\nmilestones: [3]\nschedulers:\n- _target_: {TORCHS}.LinearLR\n"
        f"- _target_: {TORCHS}.CosineAnnealingLR\n  T_max: null",
        "{}",
    ],
)
def test_schedulers_that_lightning_accepts_pass(text: str, job: Any) -> None:
    """As they were written, with the keys of Lightning's `lr_scheduler` dictionary beside them."""
    composed, written = job(text)["scheduler"], yaml.safe_load(text)
    assert {key: composed.get(key) for key in written} == written


@pytest.mark.parametrize(
    ("text", "overrides", "problem", "fix"),
    [
        (f"_target_: {TORCHS}.StepLR", [], "scheduler.step_size is missing", "scheduler.step_size="),
        (f"_target_: {TORCHS}.StepLR\nstep_size: 1\ninterval: batch", [], "scheduler.interval=batch", "interval=epoch"),
        (f"_target_: {TORCHS}.StepLR\nstep_size: 1\nfrequency: 0", [], "frequency=0", "scheduler.frequency=1"),
        ("interval: step", [], "no _target_", "scheduler._target_="),
        (f"scheduler:\n  _target_: {TORCHS}.StepLR\n  step_size: 1", [], "no _target_", "scheduler._target_="),
        (f"_target_: {TORCHS}.OneCycleLR\nmax_lr: 0.1", NO_LIMIT, "needs the length", "scheduler.total_steps=N"),
        ("_target_: trainer.schedules.cosine", NO_LIMIT, "needs the length", "trainer.max_steps=N"),
        (
            f"_target_: {TORCHS}.ReduceLROnPlateau",
            ["trainer.limit_val_batches=0"],
            "scheduler.monitor is missing",
            "scheduler.monitor=METRIC",
        ),
        (
            f"_target_: {TORCHS}.ChainedScheduler\nschedulers:\n- _target_: {TORCHS}.ExponentialLR\n  gama: 0.9",
            [],
            "takes no argument gama",
            "gamma",
        ),
        ("{}", ["optimizer=lbfgs", "strategy=fsdp"], "strategy=fsdp", "strategy=single"),
        (
            "{}",
            ["optimizer=lbfgs", "resources.gpus=0", "resources.cpu_processes=2", "strategy=ddp"],
            "each of the 2 ranks",
            "resources.cpu_processes=1",
        ),
        ("{}", ["optimizer=lbfgs", "strategy=auto", "cluster=slurm", "resources.gpus=8"], "strategy=fsdp", "gpus=1"),
        ("{}", ["optimizer=lbfgs", "trainer.precision=16"], "gradient scaler", "bf16-mixed"),
        ("{}", ["optimizer=lbfgs", "optimizer.no_decay_norm_bias=true"], "LBFGS", "no_decay_norm_bias=false"),
        ("{}", ["optimizer.no_decay_norm_bias=maybe"], "expected true or false", "no_decay_norm_bias=true"),
        ("{}", ["optimizer.decay=vectors"], "invalid choice", "choose one of: all, matrices"),
        ("{}", ["optimizer.decay=matrices", "optimizer.no_decay_norm_bias=true"], "exclude each other", "keep one"),
        ("{}", ["optimizer=lbfgs", "optimizer.decay=matrices"], "has no weight_decay", "optimizer.decay=null"),
        ("{}", ["optimizer.no_decay_norms=true"], "no_decay_norms", "no_decay_norm_bias"),
    ],
)
def test_invalid_schedulers_are_refused_with_a_fix(
    text: str, overrides: list[str], problem: str, fix: str, job: Any
) -> None:
    with pytest.raises(UserError) as caught:
        job(text, *overrides)
    assert problem in str(caught.value)
    assert fix in str(caught.value)
