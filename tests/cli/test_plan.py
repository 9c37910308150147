"""The plan that `check`, `fit --dry-run` and the first line of `fit` print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.cli.job import check_all, describe
from trainer.config.compose import compose
from trainer.core.errors import UserError

JOB = ["model=mlp", "data=digits", "resources.gpus=0", "resources.cpu_processes=2", "trainer.max_steps=100"]


def plan(*overrides: str) -> dict[str, str]:
    (job,) = check_all([compose([*JOB, *overrides], config_dirs=[])])
    return dict(describe(job))


@pytest.mark.parametrize(
    ("overrides", "title", "text"),
    [
        ([], "shape", r"2 CPU processes, strategy ddp, precision auto"),
        ([], "batch", r"32 samples per step = 2 ranks x 16"),
        (["data.micro_batch=4"], "batch", r"32 samples per step = 2 ranks x 4 x 4 accumulated"),
        (["trainer.max_epochs=3"], "until", r"100 steps or 3 epochs"),
        (["trainer.val_check_interval=null"], "validation", r"at the end of each epoch"),
        (["trainer.val_check_interval=1.0"], "validation", r"at the end of each epoch"),
        (["trainer.val_check_interval=0.25"], "validation", r"after each 0\.25 of each epoch"),
        (["trainer.val_check_interval=10"], "validation", r"every 10 optimizer steps, counted over epochs"),
        (
            ["trainer.val_check_interval=10", "trainer.check_val_every_n_epoch=1"],
            "validation",
            r"every 10 optimizer steps within each epoch",
        ),
        (["trainer.check_val_every_n_epoch=3"], "validation", r"at the end of one of 3 epochs"),
        (["trainer.limit_val_batches=0"], "validation", r"none"),
        (["checkpoint.every_n_steps=5"], "checkpoint", r"every 5 steps, .*at the end; keeps \d+ newest.*"),
        (["checkpoint.keep_best=1"], "checkpoint", r".*after each best validation and at the end; .* and the best"),
        (["checkpoint.keep_best=3"], "checkpoint", r".*; keeps \d+ newest and the 3 best"),
        (["checkpoint.keep_best=0"], "checkpoint", r".*at the end; keeps \d+ newest"),
        (["tracking=none"], "tracking", r"none"),
        (["tracking=none", "logger=csv"], "tracking", r"none, and logger csv"),
        (["tracking=wandb"], "tracking", r"wandb offline \(.*\), project mine \(WANDB_PROJECT\), entity team \(.*\)"),
        (["tracking=wandb", "tracking.mode=disabled"], "tracking", r"wandb disabled \(.*\): only metrics\.jsonl"),
    ],
)
def test_a_line_of_the_plan(
    overrides: list[str], title: str, text: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    line = plan(*overrides)[title]
    assert re.fullmatch(text, line), line


def test_the_error_of_a_sweep_names_its_job(workdir: Path) -> None:
    good, bad = (compose([*JOB, f"seed={seed}"], config_dirs=[]) for seed in (1, -1))
    with pytest.raises(UserError, match=r"the job .* seed=-1 of this sweep: seed=-1"):
        check_all([good, bad])
