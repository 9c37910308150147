"""The launch shape that `resources` requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config.shape import LaunchShape, resolve
from trainer.core import claims
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.gpu import Gpu
from trainer.core.gpus import Inventory


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The locks of the GPUs of this machine are left alone."""
    monkeypatch.setattr(claims, "_FOLDER", tmp_path)


def config(cluster: str = "local", strategy: str = "ddp", **resources: Any) -> dict[str, Any]:
    keys = ("nodes", "gpus", "gpus_per_node", "cpu_processes", "min_nodes", "devices")
    return {
        "resources": {**dict.fromkeys(keys), "spare_nodes": 0, **resources},
        "cluster": {"name": cluster},
        "strategy": {"name": strategy},
    }


def machine(gpus: int, busy: int = 0) -> Inventory:
    """A machine with GPUs, of which somebody uses the first ones."""
    holders = ["python of anna (pid 7)"] * busy + [None] * gpus
    return Inventory(tuple(Gpu(str(n), n, f"GPU-test{n}", "H200", holder=holders[n]) for n in range(gpus)))


@pytest.mark.parametrize(
    ("resources", "gpus_here", "expected"),
    [
        ({}, 0, LaunchShape(1, 2, "cpu")),
        ({}, 4, LaunchShape(1, 4, "cuda")),
        ({"gpus": 2}, 4, LaunchShape(1, 2, "cuda")),
        ({"gpus_per_node": 2}, 4, LaunchShape(1, 2, "cuda")),
        ({"gpus": 0}, 4, LaunchShape(1, 2, "cpu")),
        ({"gpus": 0, "cpu_processes": 3}, 4, LaunchShape(1, 3, "cpu")),
        ({"cpu_processes": 1}, 0, LaunchShape(1, 1, "cpu")),
        ({"strategy": "single"}, 0, LaunchShape(1, 1, "cpu")),
        ({"strategy": "single"}, 8, LaunchShape(1, 1, "cuda")),
        ({"cluster": "slurm", "gpus": 16, "nodes": 2}, 0, LaunchShape(2, 8, "cuda")),
        ({"cluster": "slurm", "gpus": 16, "gpus_per_node": 4}, 0, LaunchShape(4, 4, "cuda")),
        ({"cluster": "slurm", "nodes": 2, "cpu_processes": 4}, 8, LaunchShape(2, 2, "cpu")),
        ({"cluster": "slurm", "nodes": 3}, 0, LaunchShape(3, 1, "cpu")),
    ],
)
def test_resolves_resources(resources: dict[str, Any], gpus_here: int, expected: LaunchShape) -> None:
    shape = resolve(config(**resources), machine(gpus_here))
    assert shape == expected
    assert shape.world_size == expected.nodes * expected.processes_per_node


@pytest.mark.parametrize(
    ("resources", "gpus_here", "named", "fix"),
    [
        ({"gpus": -1}, 4, "resources.gpus=-1", "resources.gpus=0"),
        ({"nodes": 0}, 4, "resources.nodes=0", "resources.nodes=1"),
        ({"cpu_processes": 0}, 0, "resources.cpu_processes=0", "resources.cpu_processes=1"),
        ({"gpus": 5}, 4, "this machine has 4", "resources.gpus=4"),
        ({"gpus": 2, "gpus_per_node": 4}, 4, "resources.gpus_per_node=4", "resources.gpus=4"),
        ({"nodes": 2}, 4, "resources.nodes=2", "cluster=slurm"),
        ({"cluster": "slurm", "nodes": 3, "gpus": 8}, 0, "resources.nodes=3", "resources.gpus=6 or 9"),
        ({"cluster": "slurm", "nodes": 2, "cpu_processes": 3}, 0, "resources.cpu_processes=3", "=2 or 4"),
        ({"min_nodes": 2}, 0, "resources.min_nodes=2", "resources.min_nodes=1"),
        ({"strategy": "single", "gpus": 2}, 4, "strategy=single", "strategy=ddp"),
        ({"strategy": "single", "cpu_processes": 2}, 0, "strategy=single", "resources.cpu_processes=1"),
    ],
)
def test_invalid_resources_are_refused(resources: dict[str, Any], gpus_here: int, named: str, fix: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve(config(**resources), machine(gpus_here))
    assert named in raised.value.message
    assert fix in raised.value.fix


def test_requesting_gpus_without_any_is_an_environment_fault() -> None:
    with pytest.raises(EnvironmentFault, match="no usable GPU") as raised:
        resolve(config(gpus=2), machine(0))
    assert raised.value.code == 3
    assert "resources.gpus=0" in raised.value.fix


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (LaunchShape(1, 1, "cpu"), "1 CPU process"),
        (LaunchShape(1, 2, "cpu"), "2 CPU processes"),
        (LaunchShape(2, 4, "cuda"), "8 GPUs on 2 nodes"),
    ],
)
def test_description_of_a_shape(shape: LaunchShape, text: str) -> None:
    assert str(shape) == text


@pytest.mark.parametrize(
    ("resources", "busy", "expected"),
    [({}, 1, 3), ({"strategy": "single"}, 1, 1), ({"devices": ["0", "3"]}, 1, 2), ({"gpus": 4}, 1, 4), ({}, 4, 4)],
    ids=["those that nobody uses", "one", "named ones", "a number", "none is free: the launch says who uses them"],
)
def test_the_default_is_the_gpus_that_nobody_uses(resources: dict[str, Any], busy: int, expected: int) -> None:
    assert resolve(config(**resources), machine(4, busy)) == LaunchShape(1, expected, "cuda")


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"devices": ["0", "9"]}, "resources.devices: 9 is not a GPU"),
        ({"devices": []}, r"resources.devices=\[\] names no GPU"),
        ({"devices": ["0", "1"], "gpus": 3}, r"resources.devices=\[0,1\] and resources.gpus=3 contradict each other"),
        ({"devices": ["0"], "gpus": 0}, "contradict each other"),
        ({"devices": ["0"], "cluster": "slurm", "gpus": 1}, r"resources.devices=\[0\] with cluster=slurm"),
    ],
)
def test_named_gpus_that_are_not_there_or_not_ours_to_choose(resources: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config(**resources), machine(4))


def test_gpus_that_cannot_be_used_never_mean_a_training_on_cpu() -> None:
    broken = Inventory(problem=EnvironmentFault("the driver is not loaded", "load it"))
    for resources in ({}, {"gpus": 1}, {"devices": ["0"]}):
        with pytest.raises(EnvironmentFault, match="the driver is not loaded"):
            resolve(config(**resources), broken)
    assert resolve(config(gpus=0), broken).device == "cpu"
    assert resolve(config(cluster="slurm", gpus=8), broken).device == "cuda"
