"""After an exception NCCL is aborted and gloo is not. There is no NCCL here: its groups are stand-ins."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from tests.runtime.test_failure import an_attempt
from trainer.config.strategy import Single
from trainer.runtime import failure
from trainer.runtime.abort import abort_nccl
from trainer.runtime.stop import Request, StopTraining
from trainer.strategies import single


class Nccl:
    """Stands in for ProcessGroupNCCL."""

    def __init__(self, calls: list[str], name: str, hangs: threading.Event | None = None) -> None:
        self.calls, self.name, self.hangs = calls, name, hangs

    def _group_start(self) -> None:
        self.calls.append("start")

    def _group_end(self) -> None:
        self.calls.append("end")

    def abort(self) -> None:
        self.calls.append(f"abort {self.name}")
        if self.hangs is not None:
            self.hangs.wait(20)


class Group:
    """Stands in for a ProcessGroup, whose backend for CUDA is `backend`; None: it has only gloo."""

    def __init__(self, backend: Nccl | None) -> None:
        self.backend = backend

    def _get_backend(self, device: torch.device) -> Nccl:
        assert device.type == "cuda"
        if self.backend is None:
            raise RuntimeError("No backend type associated with device type cuda")
        return self.backend

    def abort(self) -> None:
        raise AssertionError("this would abort gloo, too")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three groups: NCCL's default group, gloo's group of the checkpoint writer, an axis of a mesh."""
    made: list[str] = []
    _install(monkeypatch, [Group(Nccl(made, "world")), Group(None), Group(Nccl(made, "mesh"))])
    return made


def _install(monkeypatch: pytest.MonkeyPatch, groups: list[Group]) -> None:
    names = {group: str(number) for number, group in enumerate(groups)}
    monkeypatch.setattr(distributed_c10d, "_world", SimpleNamespace(pg_names=names))
    monkeypatch.setattr(distributed_c10d, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(distributed_c10d, "is_nccl_available", lambda: True)
    monkeypatch.setattr(distributed_c10d, "is_initialized", lambda: True)


def test_every_nccl_communicator_is_aborted_in_one_group_and_gloo_is_left_alone(calls: list[str]) -> None:
    assert abort_nccl()
    assert calls == ["start", "abort mesh", "abort world", "end"]


def test_an_abort_that_hangs_does_not_hold_the_exit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    _install(monkeypatch, [Group(Nccl([], "world", hangs=never))])
    assert not abort_nccl(timeout_s=0.1)
    assert "was not aborted within 0.1 s" in caplog.text
    never.set()


def test_the_exception_of_a_rank_aborts_nccl_before_anything_waits(calls: list[str], tmp_path: Any) -> None:
    failure.conclude(ConnectionError("lost a peer"), an_attempt(tmp_path))
    assert "abort world" in calls


def test_the_strategy_aborts_at_an_exception_and_not_at_a_stop_of_all_ranks(calls: list[str]) -> None:
    strategy = single.build(Single(), torch.device("cpu"))
    strategy.on_exception(StopTraining(Request.STOP))
    assert calls == []
    strategy.on_exception(RuntimeError("in training_step"))
    assert "abort world" in calls
