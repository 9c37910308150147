"""What `benchmarks/gpu` makes of a trace and of measurements, and that its commands are valid. Nothing here trains, but
for one case at toy size."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.models.transformer import Transformer

pytestmark = pytest.mark.executed

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FACTS: dict[str, Any] = {
    "parameters": 124_439_808,
    "flops_per_token": 855_166_464,
    "tokens_per_s": 600_000.0,
    "step_ms": 109.2,
    "host_cpu_ms": 30.0,
    "peak_allocated_gb": 66.04,
    "save_stall_ms": 431.2,
    "first_step_s": 2.0,
    "start_s": 9.0,
    "waits": {"8": {}, "9": {"callbacks/guard.py:300 Event.synchronize": 1}, "10": {"callbacks/metrics.py:180": 1}},
}


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu_cases"), importlib.import_module("gpu_table")
    sys.path.remove(str(BENCHMARKS))


def test_a_row_has_the_mfu_of_the_formula_and_no_wait_but_the_guards(modules: tuple[ModuleType, ModuleType]) -> None:
    text, is_good = modules[1].table({"124m-compiled": FACTS}, 989.5e12, on_gpu=True)
    row = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    mfu = 600_000 * 855_166_464 / 989.5e12  # 0.5185
    assert row == [
        "GPT-2 124M, compiled",
        "124,439,808",
        "600,000",
        f"{mfu:.1%}",
        "109.2",
        "30.0",
        "66.0",
        "",
        "0",
        "1",
        "431",
        "2.0",
        "9.0",
        "50% MFU, no waits: met",
    ]
    assert is_good


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"tokens_per_s": 550_000.0}, "MISSED: MFU below 50%"),
        ({"waits": {"8": {"train/loop.py:1": 2}}}, "MISSED: the host waits"),
    ],
)
def test_a_goal_that_is_missed_is_named(
    modules: tuple[ModuleType, ModuleType], change: dict[str, Any], verdict: str
) -> None:
    text, is_good = modules[1].table({"124m-compiled": {**FACTS, **change}}, 989.5e12, on_gpu=True)
    assert verdict in text
    assert not is_good


def test_an_unknown_device_has_no_mfu_and_a_failure_is_in_the_table(modules: tuple[ModuleType, ModuleType]) -> None:
    text, is_good = modules[1].table({"124m": FACTS, "8b": {"failure": "exit code 1: no memory"}}, None, on_gpu=True)
    rows = text.splitlines()
    assert rows[2].split("|")[4].strip() == ""
    assert "exit code 1: no memory" in rows[3]
    assert {row.count("|") for row in rows} == {15}
    assert not is_good


def test_a_trace_is_summed_by_kernel_for_a_step(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "dur": 3000.0},
        {"cat": "kernel", "name": "gemm", "dur": 1000.0},
        {"cat": "kernel", "name": "norm", "dur": 500.0},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 9.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9.0},
        {"cat": "cpu_op", "name": "aten::mm", "dur": 9.0},
        {"name": "process_name", "ph": "M"},
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert modules[1].read_trace(path) == {  # of two steps
        "kernels_ms": {"gemm": 2.0, "norm": 0.25},
        "gpu_busy_ms": 2.25,
        "waiting_calls": {"cudaStreamSynchronize": 0.5},
    }


SIZES = {
    "124m": 124_439_808,
    "124m-compiled": 124_439_808,
    "124m-fsdp": 124_439_808,
    "1b": 1_235_814_400,
    "8b": 8_030_261_248,
    "8b-20-layers": 8_030_261_248 - 12 * 218_112_000,
}


def test_every_case_is_a_valid_job_of_its_size(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster, because this machine may have no GPU."""
    modules[0].write_project(tmp_path)
    (tmp_path / "tokens").mkdir()
    monkeypatch.chdir(tmp_path)
    assert set(SIZES) == set(modules[0].CASES)
    for name, case in modules[0].CASES.items():
        sizes = [f"model.vocab_size={case.vocabulary}", f"model.sequence_length={case.length}"]
        sizes += [f"data.sequence_length={case.length}", f"data.batch_size={case.batch}", "trainer.max_steps=100"]
        profile = ["trainer.profiler=torch", "trainer.profile_after=50", "data.root=tokens"]
        given = [*modules[0].COMMON, *case.overrides, *sizes, *profile, "cluster=slurm", "resources.gpus=1"]
        composed = compose(given, config_dirs=[], cwd=tmp_path)
        check(composed.config, tmp_path, fits=False)
        arguments = {key: value for key, value in composed.config["model"].items() if key != "_target_"}
        with torch.device("meta"):
            network = Transformer(**arguments)
        assert sum(parameter.numel() for parameter in network.parameters()) == SIZES[name], name


@pytest.mark.slow
def test_a_case_at_toy_size(tmp_path: Path, no_orphans: None) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu"), "--toy", "--only", "8b", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    facts = json.loads((tmp_path / "8b.json").read_text())
    assert facts["tokens_per_s"] > 0
    assert facts["flops_per_token"] > 6 * (facts["parameters"] - 512 * 32)
    assert "The figures mean nothing" in (tmp_path / "gpu.md").read_text()


def test_waits_are_counted_by_place_and_counting_ends(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = importlib.import_module("gpu_probe")
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: None)
    event = object.__new__(torch.cuda.Event)
    original = torch.cuda.Event.synchronize
    waits = probe.Waits()
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    warnings.warn("something else", stacklevel=1)
    event.synchronize()
    event.synchronize()
    found = waits.take()
    assert sorted(found.values()) == [1, 1, 1]
    assert all(place.startswith("benchmarks/test_gpu_benchmark.py:") for place in found)
    assert waits.take() == {}
    waits.stop()
    assert torch.cuda.Event.synchronize is original
    assert modes == ["warn", "default"]
