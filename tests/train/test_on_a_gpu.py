"""A run on one GPU: its metrics, a trace with kernels, a memory history, and ranges without Nsight Systems."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from tests.train import in_process
from trainer.hardware.peaks import peak_flops

pytestmark = pytest.mark.gpu
JOB = ["model=mlp", "data=digits", "data.batch_size=64", "data.num_workers=0", "trainer.precision=bf16-mixed"]
JOB += ["resources.gpus=1", "resources.cpu_processes=null", "strategy=single"]
JOB += ["trainer.max_steps=400", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=100"]


def test_metrics_and_a_trace(tmp_path: Path) -> None:
    run, said = in_process.fit(tmp_path, *JOB, "trainer.profiler=torch")
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    last = next(line for line in reversed(lines) if "train/loss" in line)
    assert last["gpu/peak_reserved_gb"] >= last["gpu/peak_allocated_gb"] > 0
    is_known = peak_flops(torch.cuda.get_device_name(0), "bf16") is not None
    assert ("train/mfu" in last) == is_known
    assert is_known == ("no MFU: " not in said)
    if is_known:
        assert 0 < last["train/mfu"] < 1
    with gzip.open(run.path / "profiler" / "trace-attempt-00-rank-0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


def test_a_memory_history_has_stacks_of_the_window(tmp_path: Path) -> None:
    run, _ = in_process.fit(tmp_path, *JOB, "trainer.profiler=memory", "trainer.max_steps=30")
    snapshot = pickle.loads((run.path / "profiler" / "memory-attempt-00-rank-0.pickle").read_bytes())
    entries = [entry for trace in snapshot["device_traces"] for entry in trace]
    assert any(entry["action"] == "alloc" and entry["frames"] for entry in entries)


def test_ranges_do_not_need_nsight(tmp_path: Path) -> None:
    _, said = in_process.fit(tmp_path, *JOB, "trainer.profiler=nsys", "trainer.max_steps=30")
    assert "capture for Nsight Systems ended" in said
