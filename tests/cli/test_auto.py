"""`auto` takes the first row of the plan where it is known, and keeps its meaning elsewhere; `--search`."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.plan.drawn import by_simulation, draw
from trainer.cli import auto, main
from trainer.cli.job import check_all
from trainer.config.compose import compose
from trainer.config.shape import LaunchShape
from trainer.hardware.catalogue import device
from trainer.plan.allowance import allowance

LLAMA = ["model=llama3_8b", "data=text", "data.sequence_length=8192", "data.batch_size=16", "trainer.max_steps=9"]
ON_EIGHT = ["resources.gpus=8", "resources.nodes=1", "cluster=slurm", "cluster.gpu_type=h100"]


def settled(workdir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    """The section `strategy` that is frozen, on a machine without SLURM."""
    monkeypatch.setenv("PATH", str(workdir))
    (job,) = check_all([compose([*LLAMA, *overrides], config_dirs=[])])
    strategy: dict[str, Any] = job.config["strategy"]
    return strategy


@pytest.mark.parametrize(
    ("overrides", "name", "checkpointing"),
    [
        (["strategy=auto", "strategy.activation_checkpointing=auto"], "fsdp", "full"),
        (["strategy=ddp", "strategy.activation_checkpointing=auto", "data.micro_batch=1"], "ddp", "none"),
        (["strategy=auto", "data.micro_batch=1", "strategy.compile=true"], "fsdp", "none"),
        (["strategy=auto", "cluster.gpu_type=null"], "auto", "none"),
        (["strategy=fsdp", "strategy.activation_checkpointing=auto", "cluster.gpu_type=null"], "fsdp", "none"),
    ],
)
def test_auto_is_the_fastest_that_fits(
    overrides: list[str],
    name: str,
    checkpointing: str,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strategy = settled(workdir, monkeypatch, *ON_EIGHT, *overrides)
    assert (strategy["name"], strategy["activation_checkpointing"]) == (name, checkpointing)
    assert strategy["compile"] is ("strategy.compile=true" in overrides), "other options are kept"
    notes = capsys.readouterr().err.splitlines()
    assert sum("auto" in note for note in notes) == 1, "one line says why"


def test_a_trial_still_finds_the_micro_batch(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = settled(workdir, monkeypatch, *ON_EIGHT, "strategy=auto", "data.micro_batch=auto")
    assert strategy["name"] == "fsdp"
    assert "a trial at the start finds the micro-batch, 1 is expected" in capsys.readouterr().err


def test_on_cpu_auto_is_what_it_was(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = settled(
        workdir, monkeypatch, "resources.cpu_processes=1", "strategy=auto", "strategy.activation_checkpointing=auto"
    )
    assert (strategy["name"], strategy["activation_checkpointing"]) == ("auto", "none")
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "auto" in line]
    assert note == (
        "note: strategy=single strategy.activation_checkpointing=none: auto, because CPU ranks have no memory of "
        "their own to fit into; trainer plan shows more"
    )


@cache
def peak_without_checkpointing(seed: int) -> int:
    """The simulated peak of a drawn case with AdamW."""
    return by_simulation(replace(draw(seed), optimizer="AdamW", checkpointing="none")).peak


@pytest.mark.parametrize(
    ("seed", "tightness", "is_free"),
    [
        pytest.param(seed, tightness, is_free, marks=() if place % 2 == tight ^ is_free else pytest.mark.slow)
        for place, seed in enumerate([2, 6, 9, 14])
        for tight, tightness in enumerate([0.6, 1.2])
        for is_free in (False, True)
    ],
)
def test_what_auto_picks_fits_by_simulation(seed: int, tightness: float, is_free: bool) -> None:
    """Whatever the memory of the device, the simulated step of the choice fits with its allowance."""
    case = replace(draw(seed), optimizer="AdamW")
    memory = int(peak_without_checkpointing(seed) * tightness) + sum(allowance(0, 8).values())
    config: dict[str, Any] = {
        "model": {"_target_": "trainer.models.transformer.Transformer", **case.model},
        "task": {},
        "data": {"batch_size": case.batch * case.ranks, "micro_batch": None},
        "optimizer": {"_target_": "torch.optim.AdamW", "fused": True},
        "finetune": {},
        "trainer": {"precision": case.precision, "accumulate_grad_batches": None, "find_micro_batch": True}
        | {"max_steps": 1, "gradient_clip_norm": 1.0},
        "strategy": {"name": case.strategy, "activation_checkpointing": "none", "reduce_dtype": case.reduce},
        "cluster": {},
        "resilience": {},
        "runs_dir": "none",
        "name": "drawn",
    }
    config["strategy"] |= {"shard_size": case.group} if case.strategy == "hsdp" else {}
    gpu = replace(device("NVIDIA H200"), memory_bytes=memory)
    found = auto.best(config, LaunchShape(1, case.ranks, "cuda"), gpu, is_free=is_free, kind_is_free=True)
    if found is None:
        assert tightness < 1, "what needs less than the memory is found"
        return
    chosen = found.variant
    name = chosen.strategy["name"]
    real = by_simulation(
        replace(
            case,
            device="cuda",
            batch=chosen.micro_batch,
            checkpointing=chosen.checkpointing,
            accumulates=chosen.accumulate > 1,
            strategy=name,
            group={"fsdp": case.ranks, "hsdp": case.group}.get(name, 1),
            reduce=chosen.strategy.get("reduce_dtype") or "float32",
        )
    )
    assert real.peak + sum(allowance(real.peak, case.ranks).values()) <= memory, (chosen.overrides, real.parts)


def test_nodes_are_searched_at_the_same_global_batch(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", *LLAMA[:1], "data.batch_size=64", "resources.gpus=8", "strategy=fsdp", "trainer.max_steps=9"]
    gpu = ["--gpu", "NVIDIA H200", "cluster.price_per_gpu_hour=2"]
    assert main([*job, *gpu, "--search", "nodes=1..5", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    rows = answer["alternatives"]
    assert {one["world_size"] for one in rows} == {8, 16, 32}, "3 and 5 nodes do not divide the batch"
    for one in rows:
        assert one["micro_batch"] * one["accumulate"] * one["world_size"] == 64
    times = [one["forecast"]["step_s"] for one in rows if one["fits"]]
    assert times == sorted(times)
    assert main([*job, *gpu, "--search", "nodes=1..5", "--by", "cost"]) == 2
    out, err = capsys.readouterr()
    assert "resources.nodes=4 resources.gpus=32" in out.split("\nfastest")[1]
    assert "\ncheapest" in out
    assert "resources.nodes" not in err, "the nearest that fits has the job's own nodes"
    for options, message in (
        ("--search nodes=5..1", "write --search nodes=1..64"),
        (
            "--search nodes=3",
            "--search nodes=3: the global batch of 64 cannot be divided among them, with 8 ranks each",
        ),
        ("--network inf", "--network inf: not a speed"),
        ("--alternatives -1", "write --alternatives 0 or more"),
    ):
        assert main([*job, *gpu, *options.split()]) == 2
        assert message in capsys.readouterr().err
