"""Gradient clipping with fused optimizers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.train.in_process import fit, new_run, weights
from trainer.config.strategy import STRATEGIES
from trainer.core.errors import UserError
from trainer.train.precision import BFloat16Mixed, precision_note

JOB = [
    "experiment=quickstart",
    "trainer.max_epochs=null",
    "trainer.max_steps=4",
    "trainer.gradient_clip_val=0.01",
    "optimizer=adamw",
]


def fused() -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 5.0)
    return torch.optim.AdamW([parameter], fused=True)


def test_lightning_refuses_to_clip_them_in_bf16() -> None:
    """Where this fails, `BFloat16Mixed` can go."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        MixedPrecision("bf16-mixed", "cpu").clip_gradients(fused(), 1.0)


def test_they_are_clipped_in_bf16() -> None:
    optimizer = fused()
    BFloat16Mixed("cpu").clip_gradients(optimizer, 1.0)
    (gradient,) = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
    assert float(gradient.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("lean", [True, False])
def test_a_fused_job_trains_as_one_that_is_not(workdir: Path, lean: bool) -> None:
    trained = []
    for name in ("true", "false"):
        run, _ = fit(
            workdir, *JOB, "trainer.precision=bf16-mixed", f"+optimizer.fused={name}", f"trainer.lean_loop={lean}"
        )
        trained.append(weights(run))
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], rtol=1e-5, atol=1e-6)


def test_with_loss_scaling_it_is_refused_at_the_prompt(workdir: Path) -> None:
    with pytest.raises(UserError, match="a fused optimizer unscales the gradients"):
        new_run(workdir, [*JOB, "trainer.precision=16-mixed", "+optimizer.fused=true"])


def test_bf16_true_says_what_it_gives_up_once(workdir: Path) -> None:
    _, said = fit(workdir, *JOB, "trainer.precision=bf16-true")
    (line,) = [line for line in said.splitlines() if "no fp32 master weights" in line]
    assert "2^-9" in line
    assert "optimizer=adamw_8bit" in line
    _, said = fit(workdir, *JOB[:-1], "trainer.precision=bf16-true", "optimizer=adamw_bf16")
    assert "master weights" not in said


def test_what_keeps_small_updates_has_no_note() -> None:
    def note(precision: str, strategy: str = "fsdp", **optimizer: Any) -> str | None:
        config: Any = SimpleNamespace(strategy=STRATEGIES[strategy](), optimizer=optimizer)
        return precision_note(config, precision)

    small = {"_target_": "trainer.optimizers.LowMemoryAdamW"}
    assert note("bf16-mixed", _target_="torch.optim.AdamW") is None
    assert note("bf16-true", "deepspeed_zero3", _target_="torch.optim.AdamW") is None
    assert note("bf16-true", **small) is None
    assert note("bf16-true", **small, stochastic_rounding=False, master_weights=True) is None
    assert "2^-9" in (note("bf16-true", **small, stochastic_rounding=False) or "")
    assert "no loss scaling" in (note("16-true", **small) or "")
