"""`trainer check` as a command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_prints_the_plan_and_writes_nothing(trainer_cli: Command, workdir: Path) -> None:
    done = trainer_cli("check", "resources.gpus=0")
    assert done.returncode == 0
    assert "32 samples per step = 2 ranks x 16" in done.stdout
    assert "no problems found" in done.stdout
    assert list(workdir.iterdir()) == []


def test_json_of_what_is_right(trainer_cli: Command) -> None:
    found = json.loads(trainer_cli("check", "--json", "-m", "resources.gpus=0", "seed=1,2").stdout)
    assert found["ok"] is True
    assert [job["overrides"][-1] for job in found["jobs"]] == ["seed=1", "seed=2"]
    assert found["jobs"][0]["shape"] == {"nodes": 1, "processes_per_node": 2, "device": "cpu"}


def test_json_of_what_is_wrong(trainer_cli: Command) -> None:
    done = trainer_cli("check", "--json", "resources.gpus=0", "trainer.max_steps=0", "seed=-1")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert [problem["message"].partition("=")[0] for problem in found["problems"]] == ["trainer.max_steps", "seed"]
    assert all(problem["fix"] for problem in found["problems"])


def test_deep_counts_what_was_published_without_allocating(trainer_cli: Command, workdir: Path) -> None:
    done = trainer_cli(
        "check", "--deep", "--json", "resources.gpus=0", "-m", "model=gpt2_124m,resnet50,vgg16,llama3_8b"
    )
    assert done.returncode == 0, done.stderr
    found = {job["choices"]["model"]: job for job in json.loads(done.stdout)["jobs"]}
    assert {name: job["parameters"] for name, job in found.items()} == {
        "gpt2_124m": 124_439_808,
        "resnet50": 25_557_032,
        "vgg16": 138_357_544,
        "llama3_8b": 8_030_261_248,
    }
    # Published as multiplications with their additions: 4.09 and 15.47 billion; 2 operations each.
    assert found["resnet50"]["forward_flops"] == pytest.approx(2 * 4.09e9, rel=0.002)
    assert found["vgg16"]["forward_flops"] == pytest.approx(2 * 15.47e9, rel=0.002)
    # Two a weight, the positions' table apart, and 4 x length x dim a layer for attention.
    gpt2 = found["gpt2_124m"]
    assert gpt2["tokens"] == 1024
    by_hand = 2 * (124_439_808 - 1024 * 768) + 12 * 4 * 1024 * 768
    assert gpt2["forward_flops"] / gpt2["tokens"] == pytest.approx(by_hand, rel=0.005)
    assert gpt2["training_flops"] == 3 * gpt2["forward_flops"]
    assert list(workdir.iterdir()) == []


def test_deep_looks_at_the_data_that_is_named(trainer_cli: Command) -> None:
    done = trainer_cli("check", "--deep", "resources.gpus=0", "experiment=quickstart", "model.hidden=[20]")
    assert done.returncode == 0, done.stderr
    assert f"parameters {64 * 20 + 20 + 2 * 20 + 20 * 10 + 10:,}" in done.stdout
    assert "input_shape [1, 8, 8], num_classes 10" in done.stdout


def test_deep_says_what_only_building_finds(trainer_cli: Command) -> None:
    done = trainer_cli("check", "--deep", "resources.gpus=0", "model=vit_small", "data=digits", "model.patch=3")
    assert done.returncode == 2
    assert "model.patch=3 does not divide images of 8x8" in done.stderr
