"""A short set of the faults of `trainer bench faults`; the long one is run by hand (docs/reliability.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainer.faultbench import bench

SEED = 1
STRATEGY = "fsdp"
"""One, whose unharmed run is made once; ddp meets its faults in tests/test_resume.py and tests/slurm/."""
CASES = ["hang", "save_point", "nan_rollback", "two_attempts"]


@pytest.fixture(scope="module")
def fault_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bench.FaultBench]:
    """One for all cases: the unharmed run is made once."""
    made = bench.FaultBench(tmp_path_factory.mktemp("faults"), SEED, [STRATEGY], [])
    yield made
    made.close()


@pytest.mark.usefixtures("no_orphans")
@pytest.mark.parametrize("kind", CASES)
def test_a_harmed_job_ends_like_the_unharmed_one(
    kind: str, fault_bench: bench.FaultBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRAINER_RUNS_DIR", raising=False)
    result = fault_bench.run_one(CASES.index(kind), STRATEGY, kind)
    assert result.problem is None
    assert result.attempts == (1 if kind == "two_attempts" else 2)
    assert result.lost_steps <= 2 * bench.CHECKPOINT_EVERY


def test_a_difference_is_found_and_named() -> None:
    """The comparison that all of this rests on."""
    import torch

    from trainer.faultbench.compare import _difference

    ours = {"a": torch.zeros(3), "b": [1, {"c": 2.0}], "trained_s": 1.0}
    assert _difference(ours, {"a": torch.zeros(3), "b": [1, {"c": 2.0}], "trained_s": 9.0}, "") is None
    found = _difference(ours, {"a": torch.tensor([0.0, 1e-7, 0.0]), "b": [1, {"c": 2.0}]}, "")
    assert found == "a: 1 of 3 elements differ, by up to 1e-07"
    assert _difference(ours, {"a": torch.zeros(3), "b": [1, {"c": 3.0}]}, "") == "b[1]/c: 2.0 and 3.0"
    assert _difference(ours, {"a": torch.zeros(3)}, "") == "b: only in one of the two"
