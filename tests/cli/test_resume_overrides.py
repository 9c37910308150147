"""Values set in a frozen configuration (`trainer resume`, `repro`, `predict`) are read as `trainer fit` reads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import predict
from trainer.cli.resume import with_overrides
from trainer.config.compose import compose
from trainer.config.instantiate import freeze
from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory

JOB = ["experiment=quickstart", "cluster=slurm", "resources.nodes=1", "resources.gpus_per_node=1"]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compose(JOB, config_dirs=[], cwd=tmp_path_factory.mktemp("empty")).config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("cluster.time=12:00:00", "12:00:00"),  # for YAML 43200, in base 60
        ("trainer.max_time=1:12:00:00", "1:12:00:00"),
        ("cluster.time='2-00:00:00'", "2-00:00:00"),
        ("resilience.spike_z=1e1", 10.0),
        ("cluster.account=010", "010"),  # for YAML 8
        ("cluster.qos=off", "off"),
        ("cluster.partition=gpu,cpu", "gpu,cpu"),
        ("cluster.setup=['ulimit -n 4096', b]", ["ulimit -n 4096", "b"]),
        ("resilience.spike_z=7", 7),
        ("trainer.max_steps=-1", None),  # no limit
        ("trainer.max_steps=20", 20),
        ("trainer.max_steps='70'", 70),
        ("trainer.max_steps=7e1", 70),
        ("cluster.account=7", "7"),
        ("checkpoint.save_best='false'", False),
    ],
)
def test_a_value_is_that_of_a_new_run(frozen: dict[str, Any], tmp_path: Path, override: str, value: Any) -> None:
    section, _, name = override.partition("=")[0].partition(".")
    assert with_overrides(copy.deepcopy(frozen), [override])[section][name] == value
    if not override.endswith(("gpu,cpu", "=-1")):  # without quotes a sweep for fit; Lightning's number for no limit
        composed = compose([*JOB, override], config_dirs=[], cwd=tmp_path).config
        assert composed[section][name] == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.account=[", "cluster.account=[: cannot be read (no viable alternative at input '[')\n  quote the"),
        ("cluster.account=&", "cluster.account=&: cannot be read (token recognition error at: '&')\n  quote the"),
        ("trainer.max_steps=many", "trainer.max_steps=many: expected an integer"),
        ("trainer.max_steps", "trainer.max_steps: a resumed run cannot change this\n"),
        ("+trainer.max_steps=1", "+trainer.max_steps=1: a resumed run cannot change this\n"),
        (
            "cluster.tiem=1",
            "cluster.tiem=1: a resumed run cannot change this\n  did you mean cluster.time? for all else",
        ),
        (
            "optimizer.lr=1",
            "optimizer.lr=1: a resumed run cannot change this\n  a resumed run can change keys of trainer, resources, "
            "checkpoint, resilience, data, security, cluster; for all else use trainer fit",
        ),
        (
            "data.batch_size=7",
            "data.batch_size=7: a resumed run cannot change this\n"
            "  a resumed run can change data.micro_batch, data.num_workers; for all else use trainer fit",
        ),
    ],
)
def test_what_cannot_be_read_or_changed_is_named(frozen: dict[str, Any], override: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        with_overrides(copy.deepcopy(frozen), [override])
    assert str(raised.value).startswith(said)


def test_another_number_of_gpus_is_shared_out_anew(frozen: dict[str, Any]) -> None:
    for override in ("resources.gpus=4", "resources.nodes=2", "resources.cpu_processes=2"):
        assert with_overrides(copy.deepcopy(frozen), [override])["resources"]["gpus_per_node"] is None
    kept = with_overrides(copy.deepcopy(frozen), ["resources.gpus_per_node=2", "resources.spare_nodes=1"])["resources"]
    assert (kept["gpus_per_node"], kept["spare_nodes"]) == (2, 1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.root=[", "data.root=[: cannot be read (no viable alternative at input '[')"),
        (
            "data.batch_size.x=1",
            "data.batch_size.x=1: data.batch_size is a value, not a section\n  write data.batch_size=VALUE",
        ),
        ("model.x=1", "model.x=1: only the section data can be overridden\n  write data.KEY=VALUE"),
        ("data.batch_sise=8", "data.batch_sise: trainer.data."),
    ],
)
def test_the_data_of_a_prediction(frozen: dict[str, Any], tmp_path: Path, override: str, said: str) -> None:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    run.path.mkdir()
    run.config_path.write_text(freeze(copy.deepcopy(frozen)))
    assert predict._data(run, ["data.batch_size=1_6"])["batch_size"] == 16
    with pytest.raises(UserError) as raised:
        predict._data(run, [override])
    assert str(raised.value).startswith(said)
