"""Windows of steps that `trainer.profiler` records, in runs of one process and on stand-ins for CUDA."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Trainer

from tests.train import in_process
from tests.train.two_loops import Net, loader
from trainer.callbacks import monitoring
from trainer.callbacks.profiling import (
    MEMORY_EVENTS,
    MemoryHistory,
    NsightRanges,
    ProfileWindow,
    Recorder,
    make_recorder,
)
from trainer.config.schema import TrainerOptions
from trainer.runtime.process import Rank
from trainer.train.loop import use_lean_loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]
JOB = ["model=mlp", "data=digits", "data.batch_size=64", "data.micro_batch=32", "data.num_workers=0"]
JOB += ["resources.cpu_processes=1", "trainer.max_steps=9", "trainer.limit_val_batches=0"]


def test_a_trace_has_the_steps_of_the_window_and_the_path_is_printed(tmp_path: Path) -> None:
    options = ["trainer.profiler=torch", "trainer.profile_after=4", "trainer.profile_steps=2"]
    run, said = in_process.fit(tmp_path, *JOB, *options)
    path = run.path / "profiler" / "trace-attempt-00-rank-0.json.gz"
    assert f"profiler torch: steps 5 to 6 on rank 0, to {path}" in said
    assert f"trace for https://ui.perfetto.dev: {path}" in said
    assert "Lightning's own loop" not in said
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert names.count("forward") == names.count("backward") == 4  # two micro-batches a step
    assert names.count("optimizer step") == 2
    assert any(event["name"] == "aten::addmm" for event in events)


class Recorded:
    """A recorder that notes its calls."""

    def __init__(self, warmup: int = 0) -> None:
        self.warmup = warmup
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def step(self) -> None:
        self.calls.append("step")

    def push(self, name: str) -> None:
        self.calls.append(f"+{name}")

    def pop(self) -> None:
        self.calls.append("-")

    def stop(self) -> str:
        self.calls.append("stop")
        return "written"


def train(recorder: Recorder, after: int, steps: int, lean: bool = True, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ProfileWindow(recorder, after, steps)],
        **options,
    )
    if lean:
        use_lean_loop(trainer)
    trainer.fit(Net(), loader())


@pytest.mark.parametrize("lean", [True, False])
def test_ranges_are_closed_and_in_order_under_both_loops(lean: bool) -> None:
    recorder = Recorded(warmup=1)
    train(recorder, 2, 1, lean=lean, max_steps=6)
    step = ["+forward", "-", "+backward", "-", "+optimizer step", "-", "step"]
    between = ["+data, callbacks", "-"]
    assert recorder.calls == ["start", *step, *between, *step, "stop"]  # the warm-up, then the window


def test_accumulation_counts_optimizer_steps() -> None:
    recorder = Recorded()
    train(recorder, 1, 2, max_steps=5, accumulate_grad_batches=2)
    assert recorder.calls.count("+forward") == 4
    assert (recorder.calls.count("step"), recorder.calls.count("+optimizer step")) == (2, 2)


def test_a_training_that_ends_in_the_window_still_writes(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorded()
    train(recorder, 0, 100, max_steps=3)
    assert recorder.calls[-1] == "stop"
    assert recorder.calls.count("-") == sum(call.startswith("+") for call in recorder.calls)
    assert "written" in capsys.readouterr().out


def test_a_training_that_ends_before_the_window_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorded()
    train(recorder, 50, 1, max_steps=3)
    assert recorder.calls == []
    assert "nothing was profiled: this attempt had no more than 50 steps" in capsys.readouterr().out


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[MagicMock]:
    """Calls of torch.cuda that need a driver, noted in order."""
    calls = MagicMock()
    for owner, name in (
        (torch.cuda.memory, "_record_memory_history"),
        (torch.cuda.memory, "_dump_snapshot"),
        (torch.cuda.profiler, "start"),
        (torch.cuda.profiler, "stop"),
        (torch.cuda.nvtx, "range_push"),
        (torch.cuda.nvtx, "range_pop"),
        (torch.cuda.nvtx, "mark"),
        (torch.autograd.profiler, "emit_nvtx"),
    ):
        monkeypatch.setattr(owner, name, getattr(calls, name))
    return calls


def names_of(calls: MagicMock) -> list[str]:
    return [call[0] for call in calls.mock_calls]


def test_the_memory_history_covers_the_window_only(cuda: MagicMock, tmp_path: Path) -> None:
    path = tmp_path / "profiler" / "memory.pickle"
    train(MemoryHistory(path), 1, 2, max_steps=5)
    assert names_of(cuda) == ["_record_memory_history", "_dump_snapshot", "_record_memory_history"]
    assert cuda._dump_snapshot.call_args.args == (str(path),)
    assert path.parent.is_dir()
    started, stopped = cuda._record_memory_history.call_args_list
    assert started.kwargs == {"stacks": "python", "max_entries": MEMORY_EVENTS}
    assert stopped.kwargs == {"enabled": None}


def test_nsight_gets_ranges_between_start_and_stop(cuda: MagicMock) -> None:
    train(NsightRanges(), 1, 1, max_steps=4)
    calls = names_of(cuda)
    assert (calls[0], calls[-1]) == ("start", "stop")
    assert calls[1:3] == ["emit_nvtx", "emit_nvtx().__enter__"]
    assert calls[-2] == "emit_nvtx().__exit__"
    pushed = [call.args[0] for call in cuda.range_push.call_args_list]
    assert pushed == ["forward", "backward", "optimizer step"]
    assert cuda.range_pop.call_count == 3


def test_files_are_named_by_attempt_and_rank(tmp_path: Path) -> None:
    for kind, name in (("torch", "trace-attempt-02-rank-5.json.gz"), ("memory", "memory-attempt-02-rank-5.pickle")):
        assert make_recorder(kind, tmp_path, 2, 5, after=10, steps=3)[1] == str(tmp_path / name)


def test_a_gpu_sees_the_methods_that_the_stand_ins_replace() -> None:
    """The private names exist in this torch."""
    for name in ("_record_memory_history", "_dump_snapshot"):
        assert callable(getattr(torch.cuda.memory, name))


def test_only_the_chosen_rank_records_and_rank_0_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TrainerOptions(profiler="torch", profile_rank=1, profile_after=4, profile_steps=2)
    directory = SimpleNamespace(path=tmp_path)
    found = []
    for rank in range(3):
        attempt: Any = SimpleNamespace(directory=directory, rank=Rank(rank, rank, 3, 3, 0), first_step=100)
        found.append(monitoring.make_profiler(options, attempt))
    assert [len(callbacks) for callbacks in found] == [0, 1, 0]
    path = tmp_path / "profiler" / "trace-attempt-00-rank-1.json.gz"
    assert capsys.readouterr().out == f"profiler torch: steps 105 to 106 on rank 1, to {path}\n"
    assert monitoring.make_profiler(TrainerOptions(profiler="simple"), attempt) == []
