"""What torch says of the collectives of a rank, and how long they may take from then on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from trainer.config.schema import ResilienceOptions
from trainer.resilience.collectives import request_of, trace_of
from trainer.runs.directory import RunDirectory
from trainer.worker.collectives import FlightRecorder, set_timeout
from trainer.worker.process import Rank
from trainer.worker.torch_setup import first_timeout_s

RANK = Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, attempt=2)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[distributed.ProcessGroup]:
    """A CPU group of one rank beside the default one."""
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    yield distributed.new_group(backend="gloo", timeout=timedelta(minutes=30))
    distributed.destroy_process_group()


def test_a_trace_is_written_once_it_is_asked_for(tmp_path: Path, group: distributed.ProcessGroup) -> None:
    run = RunDirectory(tmp_path / "run")
    for folder in (run.live_dir, run.logs_dir / "attempt-02"):
        folder.mkdir(parents=True)
    recorder, trace = FlightRecorder(run, RANK), trace_of(run, 2, 0)
    distributed.all_reduce(torch.ones(7), group=group)
    recorder.look()
    assert not trace.exists()
    request_of(run, 2).touch()
    recorder.look()
    last = json.loads(trace.read_text())["entries"][-1]
    assert (last["profiling_name"], last["input_sizes"], last["retired"]) == ("gloo:all_reduce", [[7]], True)
    written = trace.stat().st_mtime_ns
    recorder.look()
    assert trace.stat().st_mtime_ns == written


def test_the_timeout_of_every_group_is_set(group: distributed.ProcessGroup) -> None:
    set_timeout(123)
    for one in (group, distributed.group.WORLD):
        assert one is not None
        assert one._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=123)


def test_until_the_first_step_the_watch_for_hangs_comes_first() -> None:
    assert first_timeout_s(ResilienceOptions(collective_timeout_s=600, hang_slow_s=1800)) == 1860
    assert first_timeout_s(ResilienceOptions(collective_timeout_s=6000, hang_slow_s=1800)) == 6000
