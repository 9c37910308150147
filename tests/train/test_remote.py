"""A job whose run directory has lost its checkpoints continues from the object store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.checkpoint.object_server import running
from tests.conftest import TrainerCli
from trainer.checkpoint.faults import VARIABLE
from trainer.cli.chosen import choose
from trainer.runs.directory import RunDirectory


def test_a_job_killed_during_an_upload_continues_from_the_one_before(trainer_cli: TrainerCli, workdir: Path) -> None:
    options = [
        *("experiment=quickstart", "tracking=none", "name=remote", "resources.cpu_processes=1", "strategy=single"),
        *("trainer.max_epochs=null", "trainer.max_steps=40", "checkpoint.every_n_steps=10", "checkpoint.keep_last=1"),
        *("checkpoint.dir=s3://bucket/runs", "resilience.max_restarts=0"),
    ]
    with running() as server:
        # the files of the second checkpoint are there, and not its COMMIT
        killed = trainer_cli("fit", *options, env={VARIABLE: "upload.files:2"})
        assert killed.returncode == 1, killed.stdout + killed.stderr
        (path,) = (workdir / "runs").glob("remote-*")
        shown = json.loads(trainer_cli("show", "--json").stdout)["checkpoints"]
        url = f"s3://bucket/runs/{path.name}"
        assert [(one["step"], one["remote"]) for one in shown if one["remote"]] == [(10, f"{url}/step-00000010")]
        assert 20 in [one["step"] for one in shown], "it is complete, and only local"
        for folder in (path / "checkpoints").glob("step-*"):
            shutil.rmtree(folder)
        resumed = trainer_cli("resume", "remote")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "started"] == [0, 10]
        steps = sorted({key.split("/")[2] for key in server.keys()})  # noqa: SIM118
        assert steps == ["step-00000039", "step-00000040"]  # the best and the last
        for step in steps:
            shutil.rmtree(path / "checkpoints" / step)
        assert choose(RunDirectory(path), "best").step == 39
        assert (path / "checkpoints" / "step-00000039" / "COMMIT").is_file()


def test_the_prompt_names_the_address_and_what_is_missing(trainer_cli: TrainerCli) -> None:
    refused = trainer_cli("check", "experiment=quickstart", "checkpoint.dir=s3://me:secret@bucket")
    assert refused.returncode == 2
    assert "AWS_ACCESS_KEY_ID" in refused.stderr
    assert "secret@" not in refused.stderr + refused.stdout
