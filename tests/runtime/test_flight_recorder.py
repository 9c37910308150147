"""What torch says of the collectives of a rank, and how long they may take from then on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from trainer.config.schema import ResilienceOptions
from trainer.runs.directory import RunDirectory
from trainer.runtime.flight_recorder import FlightRecorder, Timeouts
from trainer.runtime.process import Rank

RANK = Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, attempt=2)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[distributed.ProcessGroup]:
    """A CPU group of one rank beside the default one."""
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    yield distributed.new_group(backend="gloo", timeout=timedelta(minutes=30))
    distributed.destroy_process_group()


def test_a_trace_is_written_once_it_is_asked_for(tmp_path: Path, group: distributed.ProcessGroup) -> None:
    run = RunDirectory(tmp_path / "run")
    for folder in (run.live_dir, run.attempt_logs(2)):
        folder.mkdir(parents=True)
    recorder, trace = FlightRecorder(run, RANK), run.collectives_trace(2, 0)
    distributed.all_reduce(torch.ones(7), group=group)
    recorder.check()
    assert not trace.exists()
    run.collectives_request(2).touch()
    deadline = time.monotonic() + 300
    while True:
        recorder.check()
        last = json.loads(trace.read_text())["entries"][-1]
        if last["retired"] or time.monotonic() > deadline:  # torch's thread says so just after it has woken this one
            break
        trace.unlink()
        time.sleep(0.02)
    assert (last["profiling_name"], last["input_sizes"], last["retired"]) == ("gloo:all_reduce", [[7]], True)
    written = trace.stat().st_mtime_ns
    recorder.check()
    assert trace.stat().st_mtime_ns == written


def timeouts_of(*groups: distributed.ProcessGroup | None) -> set[float]:
    return {one._get_backend(torch.device("cpu")).options._timeout.total_seconds() for one in groups if one is not None}


def test_the_timeouts_of_every_group_tighten_after_the_first_step(group: distributed.ProcessGroup) -> None:
    timeouts = Timeouts(ResilienceOptions(collective_timeout_s=123, hang_slow_s=1000))
    timeouts.on_train_start()
    assert timeouts_of(group, distributed.group.WORLD) == {1060}
    timeouts.on_first_step()
    assert timeouts_of(group, distributed.group.WORLD) == {123}


@pytest.mark.parametrize(
    ("options", "first_s"),
    [
        ({"collective_timeout_s": 600.0, "hang_slow_s": 1800.0}, 1860),
        ({"collective_timeout_s": 600.0, "hang_slow_s": 100.0, "hang_after_s": 900.0}, 960),
        ({"collective_timeout_s": 6000.0, "hang_slow_s": 1800.0}, 6000),
        ({"collective_timeout_s": 600.0, "hang_factor": 0.0}, 600),
    ],
)
def test_until_the_first_step_the_watch_for_hangs_comes_first(options: dict[str, float], first_s: float) -> None:
    assert Timeouts(ResilienceOptions(**options)).first_s == first_s  # type: ignore[arg-type]
