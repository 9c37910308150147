from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from trainer.callbacks import metrics
from trainer.callbacks.metrics import TrainMetrics


def test_the_log_has_a_line_a_second_and_one_for_the_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(metrics, "time", now)
    heartbeat: Any = Mock()
    of_run = TrainMetrics(1, 4, None, 6, heartbeat, None)
    for step, seconds in enumerate((10.0, 10.5, 11.0, 11.9, 12.3, 12.4), start=1):
        now.monotonic = lambda seconds=seconds: seconds
        of_run._show({"train/loss": 1.0}, None, None, step, say=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "3/6", "5/6", "6/6"]
    assert heartbeat.update.call_count == 6
