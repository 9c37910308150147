"""The Stop button of W&B's page, and a tag, ask the run to stop by its own protocol."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tracking.wandb_server import WandbServer
from trainer.config.schema import TrackingOptions
from trainer.runs.directory import RunDirectory
from trainer.runs.events import StopRequested
from trainer.tracking import weights_and_biases
from trainer.tracking.wandb_stop import TagWatch


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_button_and_the_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    run = RunDirectory(tmp_path / "digits-abcd1234")
    run.path.mkdir()
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        experiment = weights_and_biases.start(run, TrackingOptions(tags=["a"]), {})
        (served,) = server.runs.values()
        asked: list[str] = []
        watches = [TagWatch(experiment, tag, lambda tag=tag: asked.append(tag), every_s=0.1) for tag in ("a", "stop")]  # type: ignore[misc]
        polls = len(server.requests)
        until(lambda: len(server.requests) > polls + 4)
        assert not asked  # the tag that it began with does not count
        served.tags = ["a", "stop"]
        until(lambda: asked == ["stop"])
        served.tags = []
        polls = len(server.requests)
        until(lambda: len(server.requests) > polls + 4)
        served.tags = ["a"]
        until(lambda: asked == ["stop", "a"])
        for watch in watches:
            watch.end()
        assert not run.stop_request.exists()
        served.stops = True
        experiment.log({"loss": 1.0})  # the server answers what is sent
        until(run.stop_request.exists)
        weights_and_biases.finish(experiment, 0)
        assert server.unknown == []
    assert [event.reason for event in run.events_of(StopRequested)] == ["the Stop button of W&B"]
    import wandb

    wandb.teardown()
