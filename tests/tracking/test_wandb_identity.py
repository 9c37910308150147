"""The W&B run of a run is chosen once, and kept whatever a later shell, job or agent says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.config.schema import TrackingOptions
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking, WandbEnvironment
from trainer.runs.records import WandbRun
from trainer.tracking.client_settings import record_environment
from trainer.tracking.wandb_identity import identity, set_environment

SWEEP = {
    "WANDB_SWEEP_ID": "s1",
    "WANDB_RUN_ID": "trial1",
    "WANDB_PROJECT": "p",
    "WANDB_ENTITY": "e",
    "WANDB_SWEEP_PARAM_PATH": "wandb/sweep-s1/config-trial1.yaml",
}
NAMES = (*SWEEP, "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_BASE_URL")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [*NAMES, *(name for name in os.environ if name.startswith("WANDB_"))]:
        monkeypatch.setenv(name, "")  # to restore it afterwards: what is tested sets variables
        monkeypatch.delenv(name)
    directory = RunDirectory(tmp_path / "runs" / "digits-abcd1234")
    directory.path.mkdir(parents=True)
    return directory


def environment_in_job(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> dict[str, str]:
    """W&B's variables that a job has, of those of `SWEEP`, if it starts with `given`."""
    for name in SWEEP:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_environment(run, run.events())
    return {name: os.environ[name] for name in SWEEP if name in os.environ}


def test_a_job_without_the_agents_environment_is_still_its_trial(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in SWEEP.items():
        monkeypatch.setenv(name, value)
    record_environment(run, {"name": "wandb"})
    expected = {**SWEEP, "WANDB_SWEEP_PARAM_PATH": str(tmp_path / SWEEP["WANDB_SWEEP_PARAM_PATH"])}
    assert environment_in_job(run, monkeypatch, {}) == expected
    assert not {"id", "project", "entity"} & set(identity(run, TrackingOptions(project="mine")))
    run.write_wandb(WandbRun(id="trial1", project="p", entity="e", sweep_id="s1"))
    # A resume under another agent, and one from a shell of another project.
    other = {**SWEEP, "WANDB_SWEEP_ID": "s2", "WANDB_RUN_ID": "trial2"}
    assert environment_in_job(run, monkeypatch, other) == expected
    assert environment_in_job(run, monkeypatch, {"WANDB_PROJECT": "other"}) == expected


def test_a_run_of_no_sweep_does_not_become_the_trial_of_an_agent(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_wandb(WandbRun(id="abcd1234", project="mine", entity="me"))
    left = environment_in_job(run, monkeypatch, SWEEP)
    assert not {"WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"} & set(left)
    names = identity(run, TrackingOptions(project="changed"))
    assert (names["id"], names["project"], names["entity"]) == ("abcd1234", "mine", "me")


def test_a_run_of_an_older_release_keeps_the_id_of_its_events(run: RunDirectory) -> None:
    run.add_event(WandbEnvironment(mode="online", source="WANDB_MODE", base_url="http://127.0.0.1:9"))
    run.add_event(Tracking(mode="online", id="old", project="theirs", entity="them"))
    set_environment(run, run.events())
    assert os.environ["WANDB_BASE_URL"] == "http://127.0.0.1:9"
    names = identity(run, TrackingOptions())
    assert (names["id"], names["project"], names["entity"]) == ("old", "theirs", "them")
