"""What the first rank starts, with and without a key, by every way of saying the mode; nothing leaves unasked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.runs.test_bill import PRICES, usage
from tests.tracking.wandb_server import KEY, WandbServer
from trainer.config.schema import TrackingOptions
from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Tracking, WandbEnvironment
from trainer.runtime.process import Rank
from trainer.tracking import weights_and_biases
from trainer.tracking.loggers import Loggers


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDirectory]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_BASE_URL"):  # `start` sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(tmp_path / "runs" / "digits-abcd1234")
    directory.path.mkdir(parents=True)
    yield directory
    import wandb

    wandb.teardown()


@pytest.fixture
def server(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that answers, and a key for it: whatever is sent arrives."""
    with WandbServer() as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


def log(run: RunDirectory, options: TrackingOptions | None = None) -> Any:
    """Start, log a row, finish; the wandb Run."""
    experiment = weights_and_biases.start(run, options or TrackingOptions(), {"seed": 1})
    experiment.log({"train/loss": 1.0, "trainer/global_step": 7})
    weights_and_biases.finish(experiment, 0)
    return experiment


def tracked(run: RunDirectory) -> Tracking:
    return run.events_of(Tracking)[-1]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.wandb"))


def test_without_a_key_it_is_offline_and_asks_nobody(run: RunDirectory) -> None:
    experiment = weights_and_biases.start(run, TrackingOptions(), {"data": {"api_key": "x"}})
    assert experiment.offline
    assert (experiment.id, experiment.project, experiment.name) == ("abcd1234", "trainer", "digits-abcd1234")
    assert experiment.config["data"]["api_key"] == "***"
    weights_and_biases.finish(experiment, 0)
    assert [path.parent.parent for path in segments(run.path)] == [run.wandb_dir]
    assert (tracked(run).mode, tracked(run).source) == ("offline", "no key found")


@pytest.mark.parametrize(
    ("variables", "file", "mode", "source"),
    [
        ({"WANDB_MODE": "offline"}, "", "offline", "WANDB_MODE"),
        ({"WANDB_MODE": "dryrun"}, "", "offline", "WANDB_MODE"),
        ({"WANDB_MODE": "disabled"}, "", "disabled", "WANDB_MODE"),
        ({"WANDB_DISABLED": "true"}, "", "disabled", "WANDB_DISABLED"),
        ({"WANDB_MODE": "", "WANDB_DISABLED": "true"}, "", "disabled", "WANDB_DISABLED"),
        ({"WANDB_MODE": " "}, "offline", "offline", "settings"),
        ({}, "offline", "offline", "settings"),
        ({}, "disabled", "disabled", "settings"),
    ],
)
def test_nothing_is_sent_where_the_environment_says_so(
    variables: dict[str, str],
    file: str,
    mode: str,
    source: str,
    run: RunDirectory,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        settings = Path("wandb", "settings")
        settings.parent.mkdir()
        settings.write_text(f"[default]\nmode = {file}\n")
    experiment = log(run)
    assert not server.requests
    assert (tracked(run).mode, Path(tracked(run).source or "").name) == (mode, source)
    assert experiment.disabled is (mode == "disabled")
    assert len(segments(run.path)) == (mode == "offline")


@pytest.mark.parametrize(("variable", "served"), [("online", True), ("shared", True), ("disabled", False)])
def test_an_explicit_option_comes_before_the_variable(
    variable: str, served: bool, run: RunDirectory, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    log(run, TrackingOptions(mode="offline"))
    assert not server.requests
    log(run)
    assert [one.id for one in server.runs.values()] == (["abcd1234"] if served else [])
    assert server.unknown == []


def test_names_are_those_of_the_variables_where_no_option_says_otherwise(
    run: RunDirectory, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = {
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "somebody",
        "WANDB_NAME": "first try",
        "WANDB_TAGS": "a,b",
        "WANDB_RUN_GROUP": "g",
        "WANDB_NOTES": "for the record",
        "WANDB_JOB_TYPE": "train",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
        "WANDB_RUN_ID": "not-ours",
        "WANDB_RESUME": "never",
    }
    (tmp_path / "elsewhere").mkdir()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    experiment = log(run)
    assert (experiment.project, experiment.entity, experiment.name) == ("theirs", "somebody", "first try")
    assert (experiment.tags, experiment.group, experiment.job_type) == (("a", "b"), "g", "train")
    assert (experiment.notes, experiment.id) == ("for the record", "abcd1234")
    assert len(segments(tmp_path / "elsewhere")) == 1
    (served,) = server.runs.values()
    assert (served.project, served.name, sorted(served.tags)) == ("theirs", "first try", ["a", "b"])

    # The next attempt is the same run, whatever its shell says; and an explicit option counts.
    monkeypatch.setenv("WANDB_PROJECT", "another")
    assert log(run).project == "theirs"
    other = RunDirectory(run.path.with_name("b-efgh5678"))
    other.path.mkdir()
    assert log(other, TrackingOptions(project="mine", tags=[], run_name="n")).project == "mine"
    assert (server.runs["efgh5678"].tags, server.runs["efgh5678"].name) == ([], "n")


def test_the_server_of_the_launch_is_kept(
    run: RunDirectory, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose environment did not come with it does not send its rows to the public server."""
    run.add_event(WandbEnvironment(mode="online", source="WANDB_MODE", base_url=server.url))
    monkeypatch.delenv("WANDB_BASE_URL")
    log(run)
    assert list(server.runs) == ["abcd1234"]


def test_a_server_that_is_not_there_costs_seconds_not_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    init = wandb.init
    limits: list[float] = []

    def recording(**given: Any) -> Any:
        limits.append(given["settings"].init_timeout)
        return init(**given)

    with socket.socket() as reserved:  # bound, not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(wandb, "init", recording)
        experiment = weights_and_biases.start(run, TrackingOptions(init_timeout_s=1), {})
    assert experiment.offline
    assert experiment.id == "abcd1234"
    assert tracked(run).mode == "offline"
    assert limits == [1.0, 1.0]  # online, then offline
    weights_and_biases.finish(experiment, 0)


def test_a_variable_that_the_client_refuses_is_the_users_to_change(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "a,,b")
    with pytest.raises(UserError, match="run_tags"):
        weights_and_biases.start(run, TrackingOptions(mode="offline"), {})


def test_secrets_are_masked_at_any_depth() -> None:
    config = {"data": [{"access_token": "t", "path": "p"}], "optimizer": {"lr": 0.1}, "password": "p"}
    assert weights_and_biases.masked(config) == {
        "data": [{"access_token": "***", "path": "p"}],
        "optimizer": {"lr": 0.1},
        "password": "***",
    }


def test_an_attempt_that_is_killed_later_has_logged_its_bill(run: RunDirectory) -> None:
    run.config_path.write_text(yaml.safe_dump({"cluster": PRICES}))
    run.write_usage(usage())
    config: Any = SimpleNamespace(tracking=TrackingOptions(artifacts="none"), logger={})
    rank = Rank(rank=0, local_rank=0, world_size=1, local_world_size=1, attempt=0)
    loggers = Loggers(config, run, rank, counted=lambda: 0, unsure=[])
    (curves, _) = loggers.all
    checkpoint: Any = None  # no artifact is made of it
    assert curves.experiment.summary.get("bill/cost") is None
    loggers.checkpoint_saved(checkpoint, lambda: False)
    assert curves.experiment.summary["bill/cost"] == 8.0
    assert curves.experiment.summary["bill/energy_kwh"] == 1.0
    run.write_usage(usage(attempt=1))
    loggers.checkpoint_saved(checkpoint, lambda: False)
    assert curves.experiment.summary["bill/cost"] == 8.0, "at most once a minute"
    loggers.finish("finished")
