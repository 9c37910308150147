from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.launch.bar import duration, render, short
from trainer.runs.records import HeartbeatRecord

BEAT = HeartbeatRecord(
    step=120,
    max_steps=400,
    epoch=3,
    phase="train",
    metrics={"train/loss": 0.23456},
    rate=45210.0,
    rate_unit="tokens/s",
    eta_s=130.0,
)


def test_everything_on_a_wide_terminal() -> None:
    line = render(BEAT, 120)
    assert line.startswith("━━━━━━━━━─────────────────────  step 120/400")
    for part in ("30%", "loss 0.2346", "45.2k tokens/s", "epoch 3", "2:10 left"):
        assert part in line


def test_gpus_have_their_efficiency_memory_and_power() -> None:
    metrics = {**BEAT.metrics, "train/mfu": 0.4567, "gpu/peak_allocated_gb": 71.4, "gpu/power_w": 5234.6}
    metrics["gpu/utilization"] = 97.2
    line = render(replace(BEAT, metrics=metrics), 140)
    assert line.endswith("45.2k tokens/s  46% MFU  71 GB  GPU 97%  5,235 W  epoch 3  2:10 left")


def test_forty_columns_keep_all_but_the_rate() -> None:
    assert render(BEAT, 39) == "step 120/400 30% loss 0.2346 2:10 left"


@pytest.mark.parametrize("width", range(1, 130))
def test_never_wider_than_the_terminal(width: int) -> None:
    assert len(render(BEAT, width)) <= width


def test_before_the_first_step_and_without_a_limit() -> None:
    assert render(HeartbeatRecord(step=0, phase="build"), 80) == "step 0  build"
    assert render(HeartbeatRecord(step=7, phase="train"), 80) == "step 7"
    assert "100%" in render(replace(BEAT, step=400), 80)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 65, 3723, 90061)] == ["0:00", "1:05", "1:02:03", "1 d 01:01"]


def test_rates() -> None:
    rates = (0.5, 9.996, 12.34, 99.96, 912.0, 4521.0, 9999.4, 9999.6, 45210.0, 999_940, 999_960, 1.2e6, 999_960_000)
    assert [short(rate) for rate in rates] == [
        "0.50",
        "10.0",
        "12.3",
        "100",
        "912",
        "4,521",
        "9,999",
        "10.0k",
        "45.2k",
        "999.9k",
        "1.00M",
        "1.20M",
        "1.00G",
    ]
