"""W&B's environment variables and settings files, read as its client (0.31) reads them; imports no wandb.

The client takes `WANDB_*` first, then `./wandb/settings`, then `~/.config/wandb/settings` (`wandb offline` and `wandb
disabled` write the former). Here an explicit option of the config takes precedence over all three.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Event, WandbEnvironment

DEFAULT_PROJECT = "trainer"
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
"""Modes that the client accepts; `dryrun` is offline, `run` is online."""
_SAME = {"dryrun": "offline", "run": "online"}
_STRICTER = ("online", "shared", "offline", "disabled")
_TRUE = ("1", "true", "yes", "on", "t", "y")

_VARIABLES: dict[str, tuple[str, ...]] = {
    "mode": ("WANDB_MODE",),
    "project": ("WANDB_PROJECT",),
    "entity": ("WANDB_ENTITY",),
    "group": ("WANDB_RUN_GROUP",),
    "run_name": ("WANDB_NAME", "WANDB_RUN_NAME"),
    "tags": ("WANDB_TAGS", "WANDB_RUN_TAGS"),
    "notes": ("WANDB_NOTES", "WANDB_RUN_NOTES"),
    "job_type": ("WANDB_JOB_TYPE", "WANDB_RUN_JOB_TYPE"),
    "dir": ("WANDB_DIR", "WANDB_ROOT_DIR"),
    "base_url": ("WANDB_BASE_URL",),
    "api_key": ("WANDB_API_KEY",),
    "login_timeout": ("WANDB_LOGIN_TIMEOUT",),
    "console": ("WANDB_CONSOLE",),
    "silent": ("WANDB_SILENT",),
}
_IN_FILES = {"group": "run_group", "tags": "run_tags", "notes": "run_notes", "job_type": "run_job_type"}
"""Settings that have a different name in a file; `dir` is not allowed there."""

_UNFIT = "/\\#?%:"
"""Characters that a project's name must not have (wandb/sdk/wandb_settings.py)."""
IDENTITY = ("project", "entity", "group", "run_name", "tags", "notes", "job_type", "dir")
"""Options of the section `tracking` for which null means "as W&B's environment says"; fixed when the run is created."""


@dataclass(frozen=True)
class Setting:
    """A setting and its source: the name of a variable, the path of a file, or an option."""

    value: str
    source: str


def read(environ: Mapping[str, str], cwd: Path) -> dict[str, Setting]:
    """Read every setting that a variable or a settings file has. An empty value counts as unset.

    Raises:
        UserError: The client has no such mode.
    """
    settings: dict[str, Setting] = {}
    for path in settings_files(environ, cwd):
        settings.update(_of_file(path))
    for name, variables in _VARIABLES.items():
        for variable in variables:
            if environ.get(variable, "").strip():
                settings[name] = Setting(environ[variable], variable)
                break
    if environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        settings["mode"] = Setting("disabled", "WANDB_DISABLED")
    if environ.get("WANDB_SWEEP_ID") and "dir" in settings and Path(settings["dir"].value) == cwd:
        del settings["dir"]  # set by `wandb agent`, not by the user: a trial keeps its files in its run directory
    mode = settings.get("mode")
    if mode is not None:
        if mode.value not in MODES:
            raise UserError(f"{mode.source}: unknown W&B mode {mode.value!r}", f"use one of {', '.join(sorted(MODES))}")
        settings["mode"] = Setting(_SAME.get(mode.value, mode.value), mode.source)
    return settings


def settings_files(environ: Mapping[str, str], cwd: Path) -> list[Path]:
    """Return the paths of the client's settings files in ascending precedence; they need not exist."""
    home = environ.get("WANDB_CONFIG_DIR")
    general = Path(home).expanduser() if home else Path("~", ".config", "wandb").expanduser()
    return [general / "settings", cwd / (".wandb" if (cwd / ".wandb").exists() else "wandb") / "settings"]


def _of_file(path: Path) -> dict[str, Setting]:
    parser = configparser.ConfigParser()
    try:
        parser.read(path)
        section = dict(parser.items("default"))
    except (OSError, configparser.Error):  # missing or damaged: the client ignores it, too
        return {}
    names = {_IN_FILES.get(name, name): name for name in _VARIABLES if name != "dir"}
    return {names[key]: Setting(value, str(path)) for key, value in section.items() if key in names and value.strip()}


def mode_of(option: str, environ: Mapping[str, str], cwd: Path, recorded: Setting | None = None) -> Setting:
    """Return the mode that a run logs in: online, offline, shared or disabled.

    Args:
        option: `tracking.mode`; any value but `auto` decides.
        environ: Environment variables.
        cwd: Working directory.
        recorded: The mode in force when the run was launched or resumed. A variable that is set now takes precedence
            over it, a settings file only if it is stricter.
    """
    if option != "auto":
        return Setting(option, "tracking.mode")
    now = read(environ, cwd).get("mode")
    if now is not None and (recorded is None or now.source in environ):
        return now
    modes = [mode for mode in (now, recorded) if mode is not None]
    if modes:
        return max(modes, key=lambda mode: _STRICTER.index(mode.value))
    source = key_source(environ, cwd)
    return Setting("online", f"key in {source}") if source else Setting("offline", "no key found")


def key_source(environ: Mapping[str, str], cwd: Path) -> str | None:
    """Return the source from which the client would take an API key without a prompt; None if there is none."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environ.get(variable):
            return variable
    settings = read(environ, cwd)
    path = _netrc_path(environ)
    try:
        entries = netrc.netrc(path)
        for host in _hosts(settings["base_url"].value if "base_url" in settings else None):
            entry = entries.authenticators(host)
            if entry is not None and entry[2]:
                return str(path)
    except (OSError, netrc.NetrcParseError):
        pass
    return settings["api_key"].source if "api_key" in settings else None


def _netrc_path(environ: Mapping[str, str]) -> Path:
    if environ.get("NETRC"):
        return Path(environ["NETRC"]).expanduser()
    usual, windows = Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()
    return windows if windows.exists() and not usual.exists() else usual


def _hosts(base_url: str | None) -> list[str]:
    """Return the names under which netrc may list the server: the public one has two (wandb/sdk/lib/urls.py)."""
    public = ["api.forge.coreweave.com", "api.wandb.ai"]
    host = urlsplit(base_url).netloc if base_url else public[0]
    return public if host in (*public, "forge.coreweave.com") else [host]


def settle(tracking: dict[str, Any], environ: Mapping[str, str], cwd: Path) -> dict[str, Setting]:
    """Fill the null options of the section `tracking` from W&B's variables and files; return what was filled."""
    settings = read(environ, cwd)
    filled = {name: settings[name] for name in IDENTITY if tracking.get(name) is None and name in settings}
    for name, value in sweep_of(environ).items():
        if name in ("project", "entity"):  # the client takes those of the sweep, whatever the config says
            filled[name] = Setting(value, SWEEP[name])
    for name, setting in filled.items():
        tracking[name] = setting.value.split(",") if name == "tags" else setting.value
    if "dir" in filled:
        tracking["dir"] = str((cwd / Path(tracking["dir"]).expanduser()).absolute())
    return filled


def problems_of(
    tracking: Mapping[str, Any], environ: Mapping[str, str], filled: Mapping[str, Setting]
) -> list[UserError]:
    """Return the values of a filled section `tracking` that W&B's client would refuse.

    Includes environment variables that cannot be followed here.
    """
    problems = []
    keys = {name: filled[name].source if name in filled else f"tracking.{name}" for name in ("project", "tags")}
    project, unfit = tracking["project"] or "", sorted(set(tracking["project"] or "") & set(_UNFIT))
    if unfit or len(project) > 128:
        reason = f"contains {' '.join(unfit)}" if unfit else "has more than 128 characters"
        problems.append(
            UserError(f"{keys['project']}={project}: {reason}", "use letters, digits, - and _ in a W&B project")
        )
    for tag in tracking["tags"] or []:
        if not 1 <= len(tag) <= 64:
            problems.append(UserError(f"{keys['tags']}: {tag!r} has {len(tag)} characters", "a W&B tag has 1 to 64"))
    if environ.get("WANDB_RUN_ID") and not environ.get("WANDB_SWEEP_ID"):
        problems.append(
            UserError(
                f"WANDB_RUN_ID={environ['WANDB_RUN_ID']}: the W&B run always has the id of the run",
                "unset it; to resume a run: trainer resume RUN; to name the W&B run: tracking.run_name=NAME",
            )
        )
    return problems


def recorded_mode(events: Sequence[Event]) -> Setting | None:
    """Return the mode that the environment gave when the run was last launched or resumed; None if it gave none."""
    for event in reversed(events):
        if isinstance(event, WandbEnvironment) and event.mode:
            return Setting(event.mode, event.source or "")
    return None


def record_environment(run: RunDirectory, tracking: Mapping[str, Any]) -> None:
    """Write the event `wandb` of a launch: the job may run where these variables and files do not exist."""
    if tracking["name"] != "wandb":
        return
    settings = read(os.environ, Path.cwd())
    mode, base_url = settings.get("mode"), settings.get("base_url")
    sweep = sweep_of(os.environ)
    if mode or base_url or sweep:
        run.add_event(
            WandbEnvironment(
                mode=mode.value if mode else None,
                source=mode.source if mode else None,
                base_url=base_url.value if base_url else None,
                sweep_id=sweep.get("sweep_id"),
                run_id=sweep.get("run_id"),
                entity=sweep.get("entity"),
                project=sweep.get("project"),
                sweep_parameters=sweep.get("sweep_parameters"),
            )
        )


SWEEP = {
    "sweep_id": "WANDB_SWEEP_ID",
    "run_id": "WANDB_RUN_ID",
    "entity": "WANDB_ENTITY",
    "project": "WANDB_PROJECT",
    "sweep_parameters": "WANDB_SWEEP_PARAM_PATH",
}
"""What `wandb agent` sets for a trial, by the names of the event `wandb`."""


def sweep_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what `wandb agent` has set, by the names of `SWEEP`; empty outside a sweep."""
    if not environ.get("WANDB_SWEEP_ID"):
        return {}
    values = {name: environ[variable] for name, variable in SWEEP.items() if environ.get(variable)}
    if "sweep_parameters" in values:
        values["sweep_parameters"] = os.path.abspath(values["sweep_parameters"])
    return values
