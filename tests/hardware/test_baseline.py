"""What a machine reached earlier, and what counts as slower."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from trainer.hardware import baseline
from trainer.hardware.baseline import MOST_SAMPLES, Baseline


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_slow_measurement_is_reported_and_not_kept() -> None:
    kept = Baseline(host="a", hardware="2 x H100")
    assert kept.slower("matrix bf16 GPU 0", 1.0) is None, "nothing to compare with"
    for number in range(5):
        kept = kept.with_measured({"matrix bf16 GPU 0": 700e12 + number * 1e12}, now=float(number))
    assert kept.usual("matrix bf16 GPU 0") == 702e12
    assert kept.slower("matrix bf16 GPU 0", 690e12) is None
    assert kept.slower("matrix bf16 GPU 0", 550e12) == pytest.approx(550 / 702)
    for _ in range(2 * MOST_SAMPLES):  # it cannot become the usual value
        kept = kept.with_measured({"matrix bf16 GPU 0": 550e12})
    assert kept.usual("matrix bf16 GPU 0") == 702e12


def test_few_samples_are_kept() -> None:
    kept = Baseline(host="a", hardware="b")
    for number in range(3 * MOST_SAMPLES):
        kept = kept.with_measured({"cpu memory": 1e9 + number, "cpu matrix fp32": 0.0}, now=float(number))
    assert len(kept.samples["cpu memory"]) == MOST_SAMPLES
    assert "cpu matrix fp32" not in kept.samples, "0: not measured"


def test_every_measurement_has_a_tolerance() -> None:
    kept = Baseline(host="a", hardware="b")
    for name in ("matrix bf16 GPU 0", "memory GPU 0", "host copy GPU 0", "all-reduce of 8", "cpu matrix fp32"):
        assert kept.with_measured({name: 1.0}).slower(name, 0.1) == pytest.approx(0.1)
    assert kept.with_measured({"storage write /runs": 1.0}).slower("storage write /runs", 0.1)


def test_other_hardware_starts_anew(cache: Path) -> None:
    baseline.write(Baseline(host="node/1", hardware="8 x H100").with_measured({"all-reduce of 8": 3e11}, now=1.0))
    assert baseline.read("node/1", "8 x H100").usual("all-reduce of 8") == 3e11
    assert baseline.read("node/1", "8 x H200").samples == {}
    path = baseline.path_of("node/1")
    assert path.parent == cache / "trainer" / "baselines"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_text("{")
    assert baseline.read("node/1", "8 x H100").samples == {}
