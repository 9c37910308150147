"""What comes out of a run: predictions in order whatever the number of ranks, weights for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open

from tests.conftest import TrainerCli, freeze_older_code
from tests.documentation import documented
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import MODEL, StoredCheckpoint
from trainer.cli import main
from trainer.runs.directory import RunDirectory


@pytest.fixture
def run(trainer_cli: TrainerCli) -> RunDirectory:
    limits = ["trainer.max_steps=30", "trainer.max_epochs=null", "checkpoint.every_n_steps=15"]
    done = trainer_cli("fit", "experiment=quickstart", "tracking=none", "strategy=fsdp", *limits)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = Path("runs").iterdir()
    return RunDirectory(path.resolve())


def test_a_trained_run_predicts_and_is_exported(
    trainer_cli: TrainerCli, workdir: Path, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = json.loads(trainer_cli("evaluate", "--checkpoint", "last", "--json").stdout)
    one_rank = predictions(trainer_cli, "--ranks", "1")
    freeze_older_code(run)  # its processes import torch each; tests/cli/test_lifecycle.py evaluates such a run
    two_ranks = predictions(trainer_cli)
    numpy.testing.assert_array_equal(two_ranks, one_rank)
    assert (two_ranks == labels()).mean() == pytest.approx(evaluated["metrics"]["test/acc"])
    refused = trainer_cli("predict", "data.fodler=elsewhere")
    assert (refused.returncode, "fodler" in refused.stderr) == (2, True)

    checkpoint = CheckpointStore(run.checkpoints_dir).path(30)
    exported = trainer_cli("export", str(checkpoint), "--out", "weights", "--json")
    assert exported.returncode == 0, exported.stderr
    stored = StoredCheckpoint(checkpoint).whole(MODEL)
    with safe_open(workdir / "weights" / "model.safetensors", "pt") as file:
        assert {MODEL + name for name in file.keys()} == set(stored)  # noqa: SIM118  it is no dict
        for name, tensor in stored.items():
            assert torch.equal(file.get_tensor(name.removeprefix(MODEL)), tensor)
        assert (file.metadata()["run_id"], file.metadata()["step"]) == (run.id, "30")
    assert trainer_cli("export", "--out", "weights").returncode == 2

    shards = next(checkpoint.glob("shards/__0*"))
    content = shards.read_bytes()
    assert {one["verified"] for one in shown(capsys, 0)} == {True}
    shards.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert [one["verified"] for one in shown(capsys, 1)] == [True, False]
    sheet = trainer_cli("show", "--verify").stdout
    assert "checksums match" in sheet
    assert "DAMAGED: shards/__0_0.distcp: checksum differs" in sheet
    damaged = trainer_cli("export", "--checkpoint", "30")
    assert (damaged.returncode, "checksum differs" in damaged.stderr) == (2, True)


def shown(capsys: pytest.CaptureFixture[str], code: int) -> list[dict[str, Any]]:
    assert main(["show", "--verify", "--json"]) == code
    return json.loads(capsys.readouterr().out)["checkpoints"]


def predictions(cli: TrainerCli, *options: str) -> numpy.ndarray[Any, Any]:
    done = cli("predict", "--checkpoint", "last", "--json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert record["outputs"]["predictions"]["rows"] == len(labels())
    tree = documented("checkpoints.md", "RUN/predictions/").tree
    assert tree is not None
    assert all((Path(record["path"]) / name).exists() for name in tree[1])
    return numpy.load(Path(record["path"]) / record["outputs"]["predictions"]["file"])


def labels() -> numpy.ndarray[Any, Any]:
    """Of the test samples, in the order of the data set."""
    from trainer.data.digits import Digits

    data = Digits()
    data.setup()
    assert data.test is not None
    return numpy.array([int(data.test[index][1]) for index in range(len(data.test))])  # type: ignore[arg-type]
