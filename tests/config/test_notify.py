"""The section `notify`: what is checked at the prompt, and who may set a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config.compose import compose
from trainer.config.notify import NotifyOptions, problems_of_notify
from trainer.core.errors import UserError


def section(*overrides: str, cwd: Path | None = None) -> dict[str, Any]:
    config: dict[str, Any] = compose(["experiment=quickstart", *overrides], config_dirs=[], cwd=cwd).config["notify"]
    return config


def test_several_channels_at_once() -> None:
    found = section("notify=[slack,mail,command]", "notify.mail_to=[me@example.org]", "notify.command=[a,b]")
    assert (found["slack_env"], found["mail_to"], found["command"]) == (
        "SLACK_WEBHOOK_URL",
        ["me@example.org"],
        ["a", "b"],
    )
    assert section()["slack_env"] is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"events": ["finish"]}, "did you mean finished"),
        ({"slack_env": "https://hooks.slack.com/services/T0/B0/secret"}, "MY_VARIABLE"),
        ({"mail_to": ["me@example.org\nBcc: you"]}, "me@example.org"),
        ({"smtp_user": "me"}, "smtp_password_env"),
        ({"smtp_user": "me", "smtp_password_env": "P", "smtp_server": "mx:25", "smtp_tls": "none"}, "in clear"),
        ({"command": []}, "notify.command"),
    ],
)
def test_what_cannot_work_is_refused_without_showing_a_secret(options: dict[str, Any], problem: str) -> None:
    (error,) = NotifyOptions(**options).problems()
    assert problem in str(error)
    assert "T0/B0" not in str(error)


def test_a_variable_that_is_not_set_is_an_error_at_the_prompt() -> None:
    options = {**vars(NotifyOptions()), "slack_env": "SLACK"}
    (error,) = problems_of_notify(options, {})
    assert error.message == "notify.slack_env=SLACK: this variable is not set"
    (error,) = problems_of_notify(options, {"SLACK": "hunter2"})
    assert "hunter2" not in str(error)
    assert not list(problems_of_notify(options, {"SLACK": "https://hooks.example/x"}))


def project(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        path = tmp_path / "conf" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


EVIL = "# @package _global_\nnotify:\n  {}\n"


@pytest.mark.parametrize(
    "line", ["command: [rm, -rf, x]", "smtp_server: evil.example", "webhook_token_env: ${oc.env:HOME}"]
)
def test_a_config_file_that_is_passed_around_chooses_no_channel(tmp_path: Path, line: str) -> None:
    cwd = project(tmp_path, experiment__theirs=EVIL.format(line))
    with pytest.raises(UserError, match="must not choose"):
        compose(["model=mlp", "data=digits", "experiment=theirs"], config_dirs=[], cwd=cwd)


def test_it_may_choose_when(tmp_path: Path) -> None:
    cwd = project(tmp_path, experiment__theirs=EVIL.format("after_requeues: 7"))
    config = compose(["model=mlp", "data=digits", "experiment=theirs"], config_dirs=[], cwd=cwd).config
    assert config["notify"]["after_requeues"] == 7


def test_the_projects_own_files_may_choose(tmp_path: Path) -> None:
    cwd = project(tmp_path, notify__team="command: [./tell, team]\n")
    assert section("notify=team", cwd=cwd)["command"] == ["./tell", "team"]
    assert section("notify=[slack,team]", cwd=cwd)["slack_env"] == "SLACK_WEBHOOK_URL"
    elsewhere = tmp_path / "elsewhere"
    project(elsewhere, notify__team="command: [rm]\n")
    here = tmp_path / "here"
    here.mkdir()
    with pytest.raises(UserError, match="must not choose"):
        compose(["experiment=quickstart", "notify=team"], config_dirs=[elsewhere / "conf"], cwd=here)
