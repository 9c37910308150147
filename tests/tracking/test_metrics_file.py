from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from tests.train.two_loops import MICRO_BATCH, SAMPLES, Lines, Validated, loader
from trainer.runs.metrics_lines import rewind
from trainer.tracking.metrics_file import MetricsFile


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


def test_a_process_that_another_has_replaced_overwrites_none_of_its_lines(tmp_path: Path) -> None:
    step = 10
    path = tmp_path / "metrics.jsonl"
    logger = MetricsFile(path, lambda: step)
    logger.log_metrics({"train/loss": 1.5})
    logger.save()
    with path.open("a") as file:
        file.write('{"step": 15, "train/loss": 1.0}\n')
    step = 20
    logger.log_metrics({"train/loss": 0.5})
    logger.finalize("success")
    assert [line["step"] for line in read(path)] == [10, 15, 20]


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


def test_names_of_the_line_itself_are_kept_apart_from_what_is_logged_under_them(tmp_path: Path) -> None:
    path, steps = tmp_path / "metrics.jsonl", 7
    logger = MetricsFile(path, lambda: steps)
    logger.log_metrics({"train/loss": 0.5, "epoch": 2}, step=6)
    logger.log_metrics({"step": 99.0, "time": 1.5, "epoch": 0.25, "val/loss": 0.25}, step=99)
    steps = 8
    logger.log_metrics({"time": 2.5, "epoch": 0.5})
    logger.save()
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["step"], first["epoch"]) == (7, 2)
    assert first["time"] > 1e9
    assert (first["logged/step"], first["logged/time"], first["logged/epoch"]) == (99.0, 1.5, 0.25)
    assert (first["train/loss"], first["val/loss"]) == (0.5, 0.25)
    assert (second["step"], second["epoch"], second["logged/time"], second["logged/epoch"]) == (8, 2, 2.5, 0.5)
    assert rewind(path, 7).dropped == 1


@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The `srun` command")
def test_a_module_that_logs_its_epoch_as_the_step(tmp_path: Path) -> None:
    """To have epochs on the x axis: Lightning gives it to the loggers as their step; the file keeps its own."""

    class Logs(Validated):
        def on_train_epoch_end(self) -> None:
            self.log("step", float(self.current_epoch))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("time", 1.0)

    path = tmp_path / "metrics.jsonl"
    trainer: Any = None
    file = MetricsFile(path, lambda: trainer.global_step)
    lines = Lines()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=[file, lines],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Logs(), loader(), loader(24))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in written] == [SAMPLES // MICRO_BATCH, 2 * SAMPLES // MICRO_BATCH]
    assert all(line["time"] > 1e9 and line["logged/time"] == 1.0 for line in written)
    assert [step for step, line in lines.lines if step is not None and step < 2] == [0, 1]


def test_a_resumed_step_keeps_its_one_line(tmp_path: Path) -> None:
    """What a module logs in the batch after a checkpoint, before its step is done, is logged again by a resume."""
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, lambda: 10)
    first.log_metrics({"train/loss": 1.5, "epoch": 1})
    first.log_metrics({"by_hand": 2.0})
    first.save()
    steps = 10
    second = MetricsFile(path, lambda: steps)
    second.log_metrics({"by_hand": 2.0})
    steps = 11
    second.log_metrics({"by_hand": 3.0})
    second.save()
    assert [(line["step"], line["epoch"], line["by_hand"]) for line in read(path)] == [(10, 1, 2.0), (11, 1, 3.0)]
    assert read(path)[0]["train/loss"] == 1.5
