"""The memory benchmark counts what tensors hold: known sizes, and a small model whose sums are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

MEMORY = Path(__file__).resolve().parents[2] / "benchmarks" / "memory"
GIB = 2**30


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(str(MEMORY))
    import step

    from trainer.plan import tracked

    yield step, tracked
    del sys.modules["step"]


def test_storages_are_counted_while_they_live(benchmark: Any) -> None:
    _, tracked = benchmark
    with FakeTensorMode(), tracked.Tracked() as mode, mode.resizing():
        one = torch.empty(1000)  # 4,000 bytes: 8 blocks of 512
        view = one[10:20]
        assert mode.alive == 4096
        two = one + 1
        assert (mode.alive, mode.peak) == (8192, 8192)
        del one
        assert mode.alive == 8192, "the view holds it"
        del view
        assert (mode.alive, mode.peak) == (4096, 8192)
        two.untyped_storage().resize_(0)
        assert mode.alive == 0
        two.untyped_storage().resize_(512)
        assert mode.alive == 512


@pytest.mark.parametrize(("name", "ranks", "kept"), [("single", 1, 3), ("ddp", 8, 4), ("fsdp", 8, 3 / 8)])
def test_a_small_model_has_the_known_sums(benchmark: Any, name: str, ranks: int, kept: float) -> None:
    """At rest: float32 weights and two states of AdamW, and with ddp the buckets of the gradients."""
    step, _ = benchmark
    vocabulary, dim = 4096, 64
    setting = step.Setting({"vocab_size": vocabulary, "dim": dim, "layers": 2, "heads": 2, "tied": False}, 2, 64)
    found = step.measure(setting, name, ranks)
    width = -(-8 * dim // 3 // 32) * 32
    parameters = 2 * vocabulary * dim + 2 * (4 * dim**2 + 3 * dim * width + 2 * dim) + dim
    assert found["rest"] * GIB == pytest.approx(kept * parameters * 4, rel=0.05)  # blocks of 512 bytes
    assert found["update"] * GIB > (kept + (name != "ddp") / ranks) * parameters * 4 * 0.99
    assert found["passes"] > found["rest"]


@pytest.mark.slow
def test_8b_with_full_checkpointing_leaves_8_gb_of_a_gpu_of_141_gb(benchmark: Any) -> None:
    step, _ = benchmark
    found = step.measure(step.SETTINGS["8B, 1 x 4096, full"], "single", 1)
    assert max(found["passes"], found["update"]) * GIB < (141 - 8) * 1e9


def test_the_table_takes_the_larger_of_passes_and_update() -> None:
    sys.path.insert(0, str(MEMORY))
    try:
        from report import table
    finally:
        sys.path.remove(str(MEMORY))
    row = {"rest": 1.0, "passes": 3.0, "update": 2.0}
    assert "| m | single | 9.0 | 3.0 | 1.0 | 3.0 | 2.0 |" in table(
        {"m": {"single": row | {"update": 9.0}}}, {"m": {"single": row}}
    )
