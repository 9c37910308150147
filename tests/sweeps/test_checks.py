"""The points of a sweep share what Hydra loads; the verdict on each is that of a job composed alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from trainer.cli.job import check_all
from trainer.cli.sweep_launch import prepare
from trainer.config.compose import Composed, Loaded, compose
from trainer.core.errors import TrainerError

JOB = ["experiment=quickstart", "resources.gpus=0", "tracking=none"]
POINTS = [
    ["optimizer.lr=0.1", "seed=1"],
    ["optimizer=sgd", "optimizer.lr=0.2"],
    ["optimizer.lr=0.3", "model.hidden=[8,8]"],
    ["checkpoint=default", "name=n-${hydra:job.num}-${optimizer.lr}"],
    ["+note.text=${now:%Y}", "data.batch_size=64"],
    ["data.batch_size=33", "resources.cpu_processes=2"],
    ["optimizer.lrr=1"],
    ["model=rnn"],
    ["optimizer.lr=${nowhere}"],
    ["trainer.max_steps=0"],
]
"""Points of which the last five are refused."""


def verdict(
    overrides: list[str], number: int, loaded: Loaded | None, after: Composed | None
) -> tuple[object, Composed | None]:
    try:
        one = compose([*JOB, *overrides], config_dirs=[], number=number, loaded=loaded, after=after)
        (job,) = check_all([one])
    except TrainerError as error:
        return str(error), None
    return (one.config, one.choices, one.notes, job.shape, job.hydra), one


def test_a_point_is_judged_as_a_job_alone(workdir: Path) -> None:
    loaded, first = Loaded(), None
    for number, overrides in enumerate(POINTS):
        shared, one = verdict(overrides, number, loaded, first)
        alone, _ = verdict(overrides, number, None, first or one)  # one `${now:}`
        assert shared == alone, overrides
        assert (one is None) == (number >= 5), shared
        first = first or one


def test_the_command_finds_the_bad_point_and_makes_nothing(workdir: Path) -> None:
    overrides = [*JOB, "data.batch_size=32,64,33", "resources.cpu_processes=2"]
    arguments = argparse.Namespace(overrides=overrides, config_dir=[], config_name="config")
    with pytest.raises(TrainerError, match=r"data\.batch_size=33 of this sweep"):
        prepare(arguments)
    assert list(workdir.iterdir()) == []
