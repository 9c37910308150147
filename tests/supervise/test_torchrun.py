"""The arguments of torchrun that options of a run decide."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from trainer.config.shape import LaunchShape
from trainer.supervise.rendezvous import Place
from trainer.supervise.torchrun import command

GPU, CPU = LaunchShape(1, 2, "cuda"), LaunchShape(1, 2, "cpu")


@pytest.mark.parametrize("binding", ["node", "socket", "exclusive", "core-complex"])
def test_numa_binding_is_an_option_of_torchrun(tmp_path: Path, binding: str) -> None:
    arguments = command(tmp_path, "job", GPU, Place(), max_restarts=0, worker=["train.py"], numa_binding=binding)
    assert parse_args(arguments[2:]).numa_binding == binding


def test_numa_binding_is_not_passed_for_cpu_ranks_or_without_the_option(tmp_path: Path) -> None:
    on_cpu = command(tmp_path, "job", CPU, Place(), max_restarts=0, worker=["train.py"], numa_binding="node")
    without = command(tmp_path, "job", GPU, Place(), max_restarts=0, worker=["train.py"])
    assert parse_args(on_cpu[2:]).numa_binding is parse_args(without[2:]).numa_binding is None
