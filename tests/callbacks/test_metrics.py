from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from trainer.callbacks import metrics
from trainer.callbacks.metrics import BatchWork, Progress, TrainMetrics


def test_the_log_has_a_line_a_second_and_one_for_the_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(metrics, "time", now)
    heartbeat: Any = Mock()
    of_run = TrainMetrics(1, BatchWork(4), 6, heartbeat, None)
    for step, seconds in enumerate((10.0, 10.5, 11.0, 11.9, 12.3, 12.4), start=1):
        now.monotonic = lambda seconds=seconds: seconds
        of_run._report(Progress(step, 6, {"train/loss": 1.0}, None, "samples/s", None), prints=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "3/6", "5/6", "6/6"]
    assert heartbeat.update.call_count == 6


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (
            Progress(40, 400, {"train/loss": 0.43211}, 1234.4, "samples/s", 200.2),
            "step 40/400  loss 0.4321  1,234 samples/s  0:03:20 left",
        ),
        (Progress(7, 9, {"train/mfu": 0.4123}, 8.6, "tokens/s", 4.0), "step 7/9  9 tokens/s  41.2% MFU  0:00:04 left"),
        (Progress(7, None, {"train/acc": 1.0}, None, "tokens/s", None), "step 7"),
        (Progress(7, 9, {}, 8.6, "tokens/s", 7384.0), "step 7/9  9 tokens/s  2:03:04 left"),
    ],
)
def test_the_progress_line_leaves_out_what_is_not_known(progress: Progress, line: str) -> None:
    assert progress.line() == line


def test_throughput_is_in_tokens_if_a_sample_has_them() -> None:
    assert (BatchWork(8.0).amount, BatchWork(8.0).unit) == (8.0, "samples/s")
    assert (BatchWork(8.0, 256).amount, BatchWork(8.0, 256).unit) == (2048.0, "tokens/s")
