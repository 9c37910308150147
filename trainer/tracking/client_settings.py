"""What W&B's environment variables and settings files say, read as its client (0.31) reads them; imports no wandb.

The client takes `WANDB_*` first, then `./wandb/settings`, then `~/.config/wandb/settings` (`wandb offline` and
`wandb disabled` write the former). Here an explicit option of the configuration comes before all three.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory

DEFAULT_PROJECT = "trainer"
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
"""What the client takes; `dryrun` is offline, `run` is online."""
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
"""Of the settings those that have another name in a file; `dir` is not allowed there."""

_UNFIT = "/\\#?%:"
"""In the name of a project (wandb/sdk/wandb_settings.py)."""
IDENTITY = ("project", "entity", "group", "run_name", "tags", "notes", "job_type", "dir")
"""Keys of the section `tracking` that are null for "as W&B"; fixed when the run is made."""


@dataclass(frozen=True)
class Setting:
    """A setting and where it was found: the name of a variable, the path of a file, or an option."""

    value: str
    source: str


def read(environ: Mapping[str, str], cwd: Path) -> dict[str, Setting]:
    """Every setting that a variable or a settings file gives. An empty value is none.

    Raises UserError for a mode that the client does not know.
    """
    found: dict[str, Setting] = {}
    for path in settings_files(environ, cwd):
        found.update(_of_file(path))
    for name, variables in _VARIABLES.items():
        for variable in variables:
            if environ.get(variable, "").strip():
                found[name] = Setting(environ[variable], variable)
                break
    if environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        found["mode"] = Setting("disabled", "WANDB_DISABLED")
    mode = found.get("mode")
    if mode is not None:
        if mode.value not in MODES:
            raise UserError(
                f"{mode.source}: W&B has no mode {mode.value!r}", f"it may be one of: {', '.join(sorted(MODES))}"
            )
        found["mode"] = Setting(_SAME.get(mode.value, mode.value), mode.source)
    return found


def settings_files(environ: Mapping[str, str], cwd: Path) -> list[Path]:
    """The client's settings files, the weaker first; they need not exist."""
    home = environ.get("WANDB_CONFIG_DIR")
    general = Path(home).expanduser() if home else Path("~", ".config", "wandb").expanduser()
    return [general / "settings", cwd / (".wandb" if (cwd / ".wandb").exists() else "wandb") / "settings"]


def _of_file(path: Path) -> dict[str, Setting]:
    parser = configparser.ConfigParser()
    try:
        parser.read(path)
        section = dict(parser.items("default"))
    except (OSError, configparser.Error):  # not there, or not one: the client leaves it out, too
        return {}
    names = {_IN_FILES.get(name, name): name for name in _VARIABLES if name != "dir"}
    return {names[key]: Setting(value, str(path)) for key, value in section.items() if key in names and value.strip()}


def mode_of(option: str, environ: Mapping[str, str], cwd: Path, recorded: Setting | None = None) -> Setting:
    """The mode that a run logs in: online, offline, shared or disabled.

    Args:
        option: `tracking.mode`; anything but `auto` decides.
        recorded: what was in force when the run was launched or resumed; a variable that is set now comes before it,
            a settings file only where it is stricter.
    """
    if option != "auto":
        return Setting(option, "tracking.mode")
    now = read(environ, cwd).get("mode")
    if now is not None and (recorded is None or now.source in environ):
        return now
    found = [said for said in (now, recorded) if said is not None]
    if found:
        return max(found, key=lambda said: _STRICTER.index(said.value))
    where = key_source(environ, cwd)
    return Setting("online", f"key in {where}") if where else Setting("offline", "no key found")


def key_source(environ: Mapping[str, str], cwd: Path) -> str | None:
    """Where the client would find a key without asking anybody; None where there is none."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environ.get(variable):
            return variable
    said = read(environ, cwd)
    path = _netrc_path(environ)
    try:
        entries = netrc.netrc(path)
        for host in _hosts(said["base_url"].value if "base_url" in said else None):
            entry = entries.authenticators(host)
            if entry is not None and entry[2]:
                return str(path)
    except (OSError, netrc.NetrcParseError):
        pass
    return said["api_key"].source if "api_key" in said else None


def _netrc_path(environ: Mapping[str, str]) -> Path:
    if environ.get("NETRC"):
        return Path(environ["NETRC"]).expanduser()
    usual, windows = Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()
    return windows if windows.exists() and not usual.exists() else usual


def _hosts(base_url: str | None) -> list[str]:
    """Names under which netrc may have the server: the public one has two (wandb/sdk/lib/urls.py)."""
    public = ["api.forge.coreweave.com", "api.wandb.ai"]
    host = urlsplit(base_url).netloc if base_url else public[0]
    return public if host in (*public, "forge.coreweave.com") else [host]


def settle(tracking: dict[str, Any], environ: Mapping[str, str], cwd: Path) -> dict[str, Setting]:
    """Fill what is null in the section `tracking` with what W&B's variables and files say; returns what was filled."""
    said = read(environ, cwd)
    filled = {name: said[name] for name in IDENTITY if tracking.get(name) is None and name in said}
    for name, one in filled.items():
        tracking[name] = one.value.split(",") if name == "tags" else one.value
    if "dir" in filled:
        tracking["dir"] = str((cwd / Path(tracking["dir"]).expanduser()).absolute())
    return filled


def problems_of(
    tracking: Mapping[str, Any], environ: Mapping[str, str], filled: Mapping[str, Setting]
) -> list[UserError]:
    """What W&B's client would refuse of a settled section `tracking`, and of variables that cannot be obeyed here."""
    found = []
    keys = {name: filled[name].source if name in filled else f"tracking.{name}" for name in ("project", "tags")}
    project, unfit = tracking["project"] or "", sorted(set(tracking["project"] or "") & set(_UNFIT))
    if unfit or len(project) > 128:
        why = f"has {' '.join(unfit)}" if unfit else "is more than 128 characters long"
        found.append(UserError(f"{keys['project']}={project}: a project of W&B {why}", "use letters, digits, - and _"))
    for tag in tracking["tags"] or []:
        if not 1 <= len(tag) <= 64:
            found.append(UserError(f"{keys['tags']}: {tag!r} has {len(tag)} characters", "a tag of W&B has 1 to 64"))
    if environ.get("WANDB_RUN_ID") and not environ.get("WANDB_SWEEP_ID"):
        found.append(
            UserError(
                f"WANDB_RUN_ID={environ['WANDB_RUN_ID']}: the W&B run of a run has the run's own id",
                "unset it; to continue a run: trainer resume RUN; to name the W&B run: tracking.run_name=NAME",
            )
        )
    return found


def recorded_mode(events: list[dict[str, Any]]) -> Setting | None:
    """The mode that the last command to launch or resume the run was told by the environment; None: by nobody."""
    for event in reversed(events):
        if event["event"] == "wandb" and event.get("mode"):
            return Setting(event["mode"], event["source"])
    return None


def record_environment(run: RunDirectory, tracking: Mapping[str, Any]) -> None:
    """Write the event `wandb` of a launch: the job may run where these variables and files are not."""
    if tracking["name"] != "wandb":
        return
    said = read(os.environ, Path.cwd())
    fields = {"mode": said["mode"].value, "source": said["mode"].source} if "mode" in said else {}
    if "base_url" in said:
        fields["base_url"] = said["base_url"].value
    if fields:
        run.event("wandb", **fields)
