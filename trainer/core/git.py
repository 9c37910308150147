"""Ask git about a checkout without executing anything that the checkout configures.

A checkout may come from somebody else, and its `.git/config` can name programs: hooks, a file system monitor, filters,
external diffs, transports. They are turned off here. The configuration of the user and of the machine stays in effect.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

TIMEOUT_S = 30
_KEPT = ("GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM")
_OFF = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.pager": "cat",
    "core.sshCommand": "false",
    "core.gitProxy": "",
    "credential.helper": "",
    "diff.external": "",
    "submodule.recurse": "false",
    "protocol.allow": "never",
}
"""Options that would execute a program, with the value that executes none."""
_FILTERING = {
    "status": ("--ignore-submodules=dirty",),
    "diff": ("--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty"),
}
"""Commands that read files, for which git may call filters; with the options that prevent other programs."""
_LIST = ("config", "--show-scope", "--name-only", "-z", "--list")


def git(root: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it fails or git is not installed.

    Args:
        root: A folder in the checkout.
        arguments: The command. `status` and `diff` get options with which they start no program.
    """
    verb, *rest = arguments
    filters = _filters(root) if verb in _FILTERING else []
    if filters is None:
        return None
    output = _output([*_command(filters), verb, *_FILTERING.get(verb, ()), *rest], root)
    return None if output is None else output.rstrip("\n")


def _filters(root: Path) -> list[str] | None:
    """Return the options of the checkout that name programs for its files.

    None if they cannot all be turned off: git before 2.26 does not list them, and a name with `=` cannot be given.
    """
    listed = _output([*_command(()), *_LIST], root)
    if listed is None:
        return None
    fields = listed.split("\0")
    names = {name for scope, name in zip(fields[::2], fields[1::2], strict=False) if scope in ("local", "worktree")}
    chosen = sorted(name for name in names if name.startswith(("filter.", "merge.", "diff.")) and name.count(".") >= 2)
    return None if any("=" in name for name in chosen) else chosen


def _command(filters: Iterable[str]) -> list[str]:
    values = dict(_OFF)
    for name in filters:
        values[name] = "false" if name.endswith((".required", ".cachetextconv", ".binary")) else ""
    return ["git", "--no-pager", *(part for name, value in values.items() for part in ("-c", f"{name}={value}"))]


def _output(command: list[str], root: Path) -> str | None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _KEPT}
    variables |= {
        "GIT_OPTIONAL_LOCKS": "0",  # the index is not written, so that no hook would be called
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_TERMINAL_PROMPT": "0",
    }
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None
