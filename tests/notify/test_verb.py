"""`trainer notify` tells of a run whose processes are gone, once, and tries channels before a job is launched."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.notify.servers import HttpServer
from trainer.cli import main
from trainer.config.notify import NotifyOptions
from trainer.core import processes
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, USER_MUST_CHANGE
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Created, Started
from trainer.runs.records import Launch


@pytest.fixture
def dead_run(workdir: Path) -> RunDirectory:
    """A run of this machine whose process has ended without a word."""
    run = RunDirectory(workdir / "runs" / "digits-abcd1234")
    run.path.mkdir(parents=True, mode=0o700)
    notify = {**vars(NotifyOptions()), "webhook_env": "HOOK", "timeout_s": 5.0}
    run.config_path.write_text(yaml.safe_dump({"name": "digits", "notify": notify}))
    (run.path / "manifest.json").write_text("{}")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    launch = Launch(cluster="local", host=socket.gethostname(), boot_id=processes.boot_id(), pid=child.pid)
    run.write_launch(launch)
    run.add_event(Created())
    run.add_event(Started(attempt=0, step=0))
    return run


def test_a_silent_death_is_told_once(
    dead_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpServer() as server:
        monkeypatch.setenv("HOOK", server.url)
        assert main(["notify"]) == DONE
        assert "digits-abcd1234 died: sent by webhook" in capsys.readouterr().out
        assert main(["notify", "--json"]) == DONE
        assert json.loads(capsys.readouterr().out) == []
        (post,) = server.posts
    assert (post.body["event"], post.body["state"]) == ("failed", "dead")
    assert "they were killed" in post.body["reason"]
    assert post.body["next"] == f"trainer resume {dead_run.path}"


def test_what_was_not_sent_is_reported(
    dead_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    assert main(["notify", "abcd"]) == ENVIRONMENT_MUST_CHANGE
    assert "not sent by webhook: HOOK is not set" in capsys.readouterr().out


def test_a_run_of_somebody_else_is_not_read_for_commands(
    dead_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """blocked by: the owner of the run directory"""
    dead_run.path.chmod(0o777)
    with HttpServer() as server:
        monkeypatch.setenv("HOOK", server.url)
        assert main(["notify"]) == DONE
        assert main(["notify", "abcd"]) == USER_MUST_CHANGE
        assert not server.posts
    capsys.readouterr()


def test_channels_are_tried_before_a_job(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["notify", "--test"]) == USER_MUST_CHANGE
    assert "there is no channel" in capsys.readouterr().err
    assert main(["notify", "--test", "notify=discord"]) == USER_MUST_CHANGE
    assert "DISCORD_WEBHOOK_URL: this variable is not set" in capsys.readouterr().err
    with HttpServer() as server:
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", server.url)
        assert main(["notify", "--test", "notify=discord"]) == DONE
        assert capsys.readouterr().out == "discord: sent\n"
        (post,) = server.posts
    assert post.body["content"].startswith("trainer: this is a test")
