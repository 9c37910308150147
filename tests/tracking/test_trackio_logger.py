"""trackio's logger beside a stand-in for the package, which the suite does not install (it needs an older pillow).

tests/tracking/test_trackers.py asks the real one where it is installed.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainer.runs.directory import RunDirectory
from trainer.tracking import user_loggers
from trainer.tracking.trackio_logger import TrackioLogger

NODE = {"_target_": "trainer.tracking.trackio_logger.TrackioLogger", "project": "digits"}


class Run:
    """trackio's Run, as far as the logger uses it; its rows outlive it as in trackio's database."""

    rows: dict[str, list[dict[str, Any]]] = {}  # noqa: RUF012

    def __init__(self, project: str, name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
        import threading

        self.project, self.name, self.config, self.options = project, name, config, options
        self.id, self._is_local, self.finished = name, True, 0
        self._client_lock = threading.Lock()

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.setdefault(self.name, []).append({"step": step, "timestamp": "now", **metrics})

    def finish(self) -> None:
        self.finished += 1

    def _flush_queues_inline(self) -> None: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    package, storage = ModuleType("trackio"), ModuleType("trackio.sqlite_storage")

    class SQLiteStorage:
        @staticmethod
        def get_logs(project: str, name: str, run_id: str) -> list[dict[str, Any]]:
            return Run.rows.get(name, [])

    class Current:
        current_run = type("Variable", (), {"set": staticmethod(lambda value: None)})

    def init(project: str, name: str, config: dict[str, Any], **options: Any) -> Run:
        return Run(project, name, config, options)

    vars(package).update(init=init, context_vars=Current)
    vars(storage)["SQLiteStorage"] = SQLiteStorage
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", storage)
    monkeypatch.setattr(Run, "rows", {})
    directory = RunDirectory(tmp_path / "runs" / "digits-abcd1234")
    directory.path.mkdir(parents=True)
    (directory.path / "config.yaml").write_text("optimizer: {_target_: torch.optim.SGD, api_key: abc}\n")
    return directory


def attempt(run: RunDirectory, resumed_at: int, until: int) -> TrackioLogger:
    (logger,) = user_loggers.build({"trackio": NODE}, run, resumed_at, True, None)
    assert isinstance(logger, TrackioLogger)
    for step in range(resumed_at + 1, until + 1):
        logger.log_metrics({"loss": torch.tensor(float(step)), "epoch": 0}, step=step)
    return logger


def test_one_run_over_two_attempts_with_each_step_once(run: RunDirectory) -> None:
    first = attempt(run, 0, 5)
    made = first.experiment
    assert (made.project, made.name, made.options["resume"]) == ("digits", run.path.name, "allow")
    assert made.config == {"optimizer": {"_target_": "torch.optim.SGD", "api_key": "***"}}
    first.log_hyperparams(Namespace(lr=0.1, nested={"a": 1}))
    assert made.config["lr"] == 0.1
    assert made.config["nested/a"] == 1
    # The loss of steps 3 and 4 never got there: it was in the queue of the process that was killed.
    rows = Run.rows[run.path.name]
    rows[:] = [row for row in rows if row["step"] != 3 and row["step"] < 5]
    del rows[-1]["loss"]
    lines = [{"step": step, "epoch": 0, "time": 0.0, "loss": float(step)} for step in range(1, 5)]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    second = attempt(run, 4, 7)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, float(step)) for step in range(1, 8)]
    second.flush()
    for _ in range(2):  # Lightning ends it, and so does the run
        second.finalize("success")
    assert second.experiment.finished == 1


def test_outside_of_a_run_it_is_an_ordinary_logger(run: RunDirectory) -> None:
    logger = TrackioLogger("mine")
    assert (logger.name, logger.version) == ("mine", None)
    logger.log_metrics({"loss": 1.0})
    assert logger.experiment.options["resume"] == "never"
