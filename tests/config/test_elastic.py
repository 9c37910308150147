"""The number of nodes of a run with `resources.min_nodes`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from trainer.config.cluster import Slurm
from trainer.config.elastic import most_nodes
from trainer.config.shape import LaunchShape
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Launch
from trainer.runtime.micro_batch import limited
from trainer.runtime.process import Rank
from trainer.slurm.options import sbatch_options


def config(min_nodes: int | None, batch_size: int | None = 48, **strategy: Any) -> dict[str, Any]:
    return {
        "resources": {"min_nodes": min_nodes, "spare_nodes": 0},
        "data": {"batch_size": batch_size},
        "strategy": {"name": "ddp", **strategy},
    }


@pytest.mark.parametrize(
    ("options", "available", "expected"),
    [
        (config(None), 4, 4),
        (config(None), 3, None),
        (config(2), 5, 4),
        (config(2), 3, 3),
        (config(3), 2, None),
        (config(1, batch_size=16), 3, 2),
        (config(1, batch_size=None), 3, None),
        (config(1, batch_size=None), 4, 4),
        (config(1, name="hsdp", shard_size=4), 3, 2),
        (config(1, name="tp", tensor_parallel_size=2), 3, 3),
        (config(1, batch_size=8, name="tp", tensor_parallel_size=2), 3, 2),
    ],
)
def test_most_nodes_that_divide_the_batch(options: dict[str, Any], available: int, expected: int | None) -> None:
    assert most_nodes(options, LaunchShape(4, 2, "cuda"), available) == expected


def rank(world_size: int) -> Rank:
    return Rank(rank=0, local_rank=0, world_size=world_size, local_world_size=1, attempt=0)


@pytest.mark.parametrize(
    ("data", "ranks", "expected"),
    [
        ({"batch_size": 48}, 8, {"batch_size": 48}),
        ({"batch_size": 48}, 4, {"batch_size": 48, "micro_batch": 6}),
        ({"batch_size": 48}, 6, {"batch_size": 48, "micro_batch": 4}),
        ({"batch_size": 48, "micro_batch": 2}, 6, {"batch_size": 48, "micro_batch": 2}),
        ({}, 4, {}),
    ],
)
def test_the_micro_batch_does_not_grow_with_fewer_ranks(
    tmp_path: Path, data: dict[str, Any], ranks: int, expected: dict[str, Any]
) -> None:
    run = RunDirectory(tmp_path)
    run.write_launch(Launch(shape=LaunchShape(4, 2, "cpu")))
    assert limited(data, run, rank(ranks), ranks, None) == expected


def test_sbatch_requests_a_range_of_nodes() -> None:
    config_dict = {**config(2), "cluster": asdict(Slurm())}
    assert ("nodes", "2-4") in sbatch_options(config_dict, LaunchShape(4, 2, "cuda"), None)
    config_dict["resources"]["min_nodes"] = 3
    config_dict["data"]["batch_size"] = 512  # does not divide over three nodes of two ranks
    assert ("nodes", "4") in sbatch_options(config_dict, LaunchShape(4, 2, "cuda"), None)
    assert ("nodes", "4-8") in sbatch_options(config_dict, LaunchShape(8, 2, "cuda"), None)
    config_dict["resources"]["min_nodes"] = None
    assert ("nodes", "4") in sbatch_options(config_dict, LaunchShape(4, 2, "cuda"), None)
