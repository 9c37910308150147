"""What `trainer fit` prints of its plan, what it refuses, and when it asks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import approval, main
from trainer.cli.job import Job, check_all
from trainer.config.compose import compose
from trainer.core.errors import UserError
from trainer.core.units import gib
from trainer.hardware.catalogue import device

LLAMA = [
    *("model=llama3_8b", "data=text", "data.sequence_length=8192", "data.batch_size=16"),
    *("resources.gpus=8", "resources.nodes=1", "trainer.max_steps=1000"),
    *("cluster=slurm", "cluster.gpu_type=h100", "cluster.time=4:00:00"),
]


def approves(jobs: list[Job], arguments: argparse.Namespace) -> bool:
    return approval.approve(jobs, [approval.plan_of(job) for job in jobs], arguments)


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"anyway": False, "yes": False, **given})


@pytest.fixture
def job(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns checked jobs, on a machine without SLURM."""
    monkeypatch.setenv("PATH", str(workdir))

    def checked(*overrides: str) -> Job:
        (one,) = check_all([compose([*LLAMA, *overrides], config_dirs=[])])
        return one

    return checked


def test_a_job_that_fits_is_launched_with_two_lines(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    full = "strategy.activation_checkpointing=full"
    one = job("strategy=fsdp", full, "cluster.price_per_gpu_hour=3")
    found = approval.plan_of(one)
    assert approval.approve([one], [found], options())
    memory, time = capsys.readouterr().out.splitlines()
    assert memory.startswith("plan: 29.7")
    assert " of 93.02 GiB on NVIDIA H100 NVL (error: on a GPU not known" in memory
    assert "tokens/s" in time
    assert "GPU hours" in time
    assert "error: not known" in time
    assert found is not None
    kept = found.record()
    assert (kept.engine, kept.device, kept.steps) == ("formula", "NVIDIA H100 NVL", 1000)
    assert kept.needed_bytes
    assert memory.startswith(f"plan: {gib(kept.needed_bytes)} of")
    assert kept.train_s == pytest.approx(1000 * (kept.step_s or 0))
    assert kept.cost == pytest.approx(3 * (kept.device_hours or 0))


def test_what_cannot_fit_is_refused_with_the_nearest_that_does(job: Any) -> None:
    large = job("strategy=ddp")
    with pytest.raises(
        UserError, match=r"GiB of tensors on each GPU do not fit 93.02 GiB of NVIDIA H100 NVL"
    ) as refused:
        approves([large], options())
    assert refused.value.fix.startswith("the nearest that fits: strategy=fsdp data.micro_batch=1 ")
    assert approves([large], options(anyway=True))


def test_expensive_jobs_are_asked_for_on_a_terminal(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = iter(["y", "n", "", None])

    def answer(question: str) -> str:
        asked.append(question)
        if (given := next(answers)) is None:
            raise EOFError
        return given

    monkeypatch.setattr("builtins.input", answer)
    cheap = job("strategy=fsdp", "strategy.activation_checkpointing=full", "cluster.confirm_above_gpu_hours=1000")
    dear = job("strategy=fsdp", "strategy.activation_checkpointing=full", "cluster.confirm_above_gpu_hours=2")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert approves([cheap], options())
    assert not asked
    assert approves([dear], options())
    assert "more than cluster.confirm_above_gpu_hours=2. Launch? [y/N]" in asked[0]
    assert not approves([dear], options())
    assert not approves([cheap, dear], options()), "the sum of a sweep"
    assert approves([dear], options(yes=True))
    assert not approves([dear], options()), "Ctrl-D"
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert approves([dear], options()), "a script is not asked"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("h100", "NVIDIA H100 NVL"),
        ("nvidia_h200", "NVIDIA H200"),
        ("V100", "Tesla V100-SXM2-32GB"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("mi300x", "AMD Instinct MI300X"),
        ("gpu", None),
        (None, None),
    ],
)
def test_the_gpu_of_a_cluster(kind: str | None, name: str | None) -> None:
    found = approval.device_of({"cluster": {"name": "slurm", "gpu_type": kind}})
    assert (found.memory_bytes if found else None) == (device(name).memory_bytes if name else None)


def test_an_unknown_job_is_launched_without_a_plan(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert approves([job("data.micro_batch=auto")], options()), "found at the start"
    assert approves([job("cluster.gpu_type=null")], options())
    assert capsys.readouterr().out == ""


def test_a_dry_run_prints_the_plan(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *LLAMA, "strategy=ddp", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("plan: 254.5")
