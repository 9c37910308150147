from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.tracking.metrics_file import MetricsFile, rewind


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_a_step_whatever_the_number_of_calls(tmp_path: Path) -> None:
    step = 10
    path = tmp_path / "metrics.jsonl"
    logger = MetricsFile(path, lambda: step)
    logger.log_metrics({"train/loss": 1.5, "epoch": 0}, step=9)
    logger.log_metrics({"val/acc": 0.5}, step=10)
    assert not path.exists()
    step = 20
    logger.log_metrics({"train/loss": float("nan")}, step=19)
    logger.save()
    first, second = read(path)
    assert (first["step"], first["epoch"], first["train/loss"], first["val/acc"]) == (10, 0, 1.5, 0.5)
    assert second["step"] == 20
    assert second["train/loss"] == "nan"  # JSON has no NaN


def test_what_comes_after_a_checkpoint_joins_the_line(tmp_path: Path) -> None:
    step = 10
    path = tmp_path / "metrics.jsonl"
    logger = MetricsFile(path, lambda: step)
    logger.log_metrics({"train/loss": 1.5})
    logger.save()
    logger.log_metrics({"train/loss": 2.5, "epoch_end": 1.0})
    logger.save()
    step = 20
    logger.log_metrics({"train/loss": 0.5})
    logger.finalize("success")
    assert [(line["step"], line["train/loss"]) for line in read(path)] == [(10, 2.5), (20, 0.5)]
    assert read(path)[0]["epoch_end"] == 1.0


def test_rewind_drops_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "time": 90}\n{"step": 20, "time": 97.5}\n{"step": 30, "time": 101}\n{"step": 4')
    rewound = rewind(path, 20)
    assert rewound.dropped == 2
    assert [line["step"] for line in rewound.recent] == [20]
    assert [line["step"] for line in read(path)] == [10, 20]
    assert rewind(path, 20).dropped == 0
    assert rewind(tmp_path / "missing.jsonl", 0).recent == []


def test_only_a_save_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a step must not cost a step 2 ms; a checkpoint must find the lines before it on the disk."""
    synced: list[str] = []
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_text()))
    steps = [10]
    logger = MetricsFile(path, lambda: steps[-1])
    for step in (10, 20, 30):
        steps.append(step)
        logger.log_metrics({"train/loss": 1.5})
    assert [line["step"] for line in read(path)] == [10, 20]
    assert not synced
    logger.save()
    assert len(synced) == 1
    assert [json.loads(line)["step"] for line in synced[0].splitlines()] == [10, 20, 30]
    logger.save()
    assert len(synced) == 1
