"""What we read of W&B's variables and files is what its own client reads; the client is asked in one other process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment
from trainer.core.errors import UserError
from trainer.tracking import client_settings
from trainer.tracking.client_settings import Setting

KEY = "local" + "0" * 40

CASES: dict[str, tuple[dict[str, str], str, str]] = {
    # name: variables, ./wandb/settings, ~/.config/wandb/settings
    "nothing": ({}, "", ""),
    "offline": ({"WANDB_MODE": "offline"}, "", ""),
    "disabled": ({"WANDB_MODE": "disabled"}, "", ""),
    "dryrun": ({"WANDB_MODE": "dryrun"}, "", ""),
    "run": ({"WANDB_MODE": "run"}, "", ""),
    "shared": ({"WANDB_MODE": "shared"}, "", ""),
    "local file": ({}, "mode = offline\nproject = local", "mode = disabled\nentity = them"),
    "general file": ({}, "", "mode = disabled\nproject = general\nrun_group = g\nbase_url = http://localhost:9"),
    "variable before file": ({"WANDB_MODE": "online", "WANDB_ENTITY": "me"}, "mode = disabled", "entity = them"),
    "names": (
        {
            "WANDB_PROJECT": "p",
            "WANDB_ENTITY": "e",
            "WANDB_NAME": "n",
            "WANDB_TAGS": "a, b,c",
            "WANDB_RUN_GROUP": "g",
            "WANDB_NOTES": "some notes",
            "WANDB_JOB_TYPE": "j",
            "WANDB_BASE_URL": "http://localhost:9",
            "WANDB_SILENT": "true",
        },
        "",
        "",
    ),
    "second names": ({"WANDB_RUN_NAME": "n", "WANDB_RUN_NOTES": "x", "WANDB_RUN_JOB_TYPE": "j"}, "", ""),
    "no settings file": ({}, "mode offline", "[other]\nmode = offline"),
    "config dir": ({"WANDB_CONFIG_DIR": "elsewhere"}, "", "mode = disabled"),
}

ASK_THE_CLIENT = """
import json, os, sys
import wandb
found, clean = {}, dict(os.environ)
for name, (variables, folder) in json.load(sys.stdin).items():
    os.environ.clear()
    os.environ.update({**clean, "HOME": folder, "WANDB_SILENT": "true", **variables})
    os.chdir(folder)
    wandb.teardown()
    settings = wandb.setup(wandb.Settings()).settings
    found[name] = {key: getattr(settings, key) for key in (
        "mode", "project", "entity", "run_group", "run_name", "run_tags", "run_notes", "run_job_type", "base_url")}
wandb.teardown()
print(json.dumps(found))
"""


def test_the_client_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    for number, (name, (variables, local, general)) in enumerate(CASES.items()):
        home = tmp_path / str(number)
        for folder, text in ((home / "wandb", local), (home / ".config" / "wandb", general)):
            folder.mkdir(parents=True)
            if text:
                section = "" if text.startswith(("[", "mode offline")) else "[default]\n"
                (folder / "settings").write_text(section + text)
        asked[name] = ({"WANDB_ERROR_REPORTING": "false", **variables}, str(home))
    done = subprocess.run(
        [sys.executable, "-c", ASK_THE_CLIENT],
        input=json.dumps(asked),
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    usual = answers["nothing"]
    for name, (variables, folder) in asked.items():
        monkeypatch.setenv("HOME", folder)
        said = client_settings.read(variables, Path(folder))
        names = {"group": "run_group", "tags": "run_tags", "notes": "run_notes", "job_type": "run_job_type"}
        ours = {names.get(key, key): one.value for key, one in said.items() if key != "silent"}
        theirs = {key: value for key, value in answers[name].items() if value != usual[key]}
        if "run_tags" in ours:
            assert ours.pop("run_tags").split(",") == theirs.pop("run_tags"), name
        theirs["mode"] = {"dryrun": "offline", "run": "online"}.get(answers[name]["mode"], answers[name]["mode"])
        assert {"mode": "online", **ours} == theirs, name


@pytest.mark.parametrize(
    ("option", "variables", "recorded", "expected"),
    [
        ("auto", {"WANDB_API_KEY": KEY}, None, Setting("online", "key in WANDB_API_KEY")),
        ("auto", {}, None, Setting("offline", "no key found")),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, None, Setting("disabled", "WANDB_MODE")),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, None, Setting("disabled", "WANDB_DISABLED")),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_DISABLED": "false"}, None, Setting("online", "key in WANDB_API_KEY")),
        ("auto", {"WANDB_MODE": "online"}, None, Setting("online", "WANDB_MODE")),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": ""}, None, Setting("online", "key in WANDB_API_KEY")),
        # Where the job runs nothing is set: what was set where it was launched counts.
        ("auto", {"WANDB_API_KEY": KEY}, Setting("offline", "WANDB_MODE"), Setting("offline", "WANDB_MODE")),
        # A resume from a shell that says otherwise.
        ("auto", {"WANDB_MODE": "disabled"}, Setting("offline", "WANDB_MODE"), Setting("disabled", "WANDB_MODE")),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, None, Setting("offline", "tracking.mode")),
        ("online", {"WANDB_MODE": "disabled"}, None, Setting("online", "tracking.mode")),
    ],
)
def test_mode(
    option: str,
    variables: dict[str, str],
    recorded: Setting | None,
    expected: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert client_settings.mode_of(option, variables, tmp_path, recorded) == expected


def test_a_settings_file_is_obeyed_where_it_is_the_stricter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = tmp_path / "wandb" / "settings"
    settings.parent.mkdir()
    with_key = {"WANDB_API_KEY": KEY}
    for text, recorded, expected in (
        ("offline", None, "offline"),
        ("disabled", Setting("offline", "WANDB_MODE"), "disabled"),
        ("online", Setting("offline", "WANDB_MODE"), "offline"),
    ):
        settings.write_text(f"[default]\nmode = {text}\n")
        assert client_settings.mode_of("auto", with_key, tmp_path, recorded).value == expected


@pytest.mark.parametrize(
    ("machine", "variables", "has_key"),
    [
        ("api.wandb.ai", {}, True),
        ("api.forge.coreweave.com", {}, True),
        ("other.org", {}, False),
        ("localhost:8080", {"WANDB_BASE_URL": "http://localhost:8080"}, True),
        ("api.wandb.ai", {"WANDB_BASE_URL": "http://localhost:8080"}, False),
    ],
)
def test_the_netrc_entry_of_the_server_is_a_key(
    machine: str, variables: dict[str, str], has_key: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    found = client_settings.key_source({"NETRC": str(netrc), **variables}, tmp_path)
    assert (found == str(netrc)) is has_key


def test_what_the_client_would_refuse_is_refused() -> None:
    with pytest.raises(UserError, match="WANDB_MODE: unknown W&B mode 'Offline'"):
        client_settings.read({"WANDB_MODE": "Offline"}, Path("/nowhere"))
    tracking = {"project": "a/b", "tags": ["", "x" * 65, "good"]}
    filled = {"project": Setting("a/b", "WANDB_PROJECT")}
    problems = client_settings.problems_of(tracking, {"WANDB_RUN_ID": "abc"}, filled)
    assert [problem.message.split(":")[0] for problem in problems] == [
        "WANDB_PROJECT=a/b",
        "tracking.tags",
        "tracking.tags",
        "WANDB_RUN_ID=abc",
    ]
    in_sweep = {"WANDB_RUN_ID": "a", "WANDB_SWEEP_ID": "s"}
    assert not client_settings.problems_of({"project": None, "tags": None}, in_sweep, {})
