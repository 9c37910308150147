"""Decide whether a run may be executed: whoever can write to its directory executes code as the user who resumes it.

`code/` is imported, `config.yaml` names what is called, `job.sbatch` is a shell script, `.hydra/` sets environment
variables. So a run is trusted as ssh trusts its files: it belongs to the user or to root, and nobody else may write to
it. A group counts as the user's own if it has no other member.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.core.errors import UserError
from trainer.runs.code_files import MODULES
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs, find, reference_to

_EXECUTED = ("code", "imports", ".hydra")
"""Folders from which modules, or environment variables, are taken."""
_NO_LINKS = (
    *_EXECUTED,
    *("config.yaml", "overrides.txt", "manifest.json", "launch.json", "job.sbatch"),
    *("checkpoints", "control", "events.jsonl", "logs", "live", "attempts"),
)
"""What a launch makes itself and never as a symbolic link, except below `code/`."""


def why_untrusted(run: RunDirectory) -> str | None:
    """Return why the run must not be executed without being asked for; None: only the user can have written it."""
    try:
        return next(_problems(run.path), None)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def require(run: RunDirectory, trusted: bool = False) -> None:
    """Check that a run may be executed.

    Args:
        run: The run.
        trusted: The user has said so (`--trust`); then only symbolic links are refused.

    Raises:
        UserError: Somebody else may have written it.
    """
    linked = next((run.path / name for name in _NO_LINKS if (run.path / name).is_symlink()), None)
    if linked is not None:
        raise UserError(
            f"{_shown(linked)} is a symbolic link: what a command writes or deletes there would be elsewhere",
            "move the folder or file that it names to this place",
        )
    reason = None if trusted else why_untrusted(run)
    if reason is not None:
        repair = f"chown -R {_user(os.geteuid())}" if " belongs to " in reason else "chmod -R go-w"
        raise UserError(
            f"{_shown(run.path)} is not executed: {reason}",
            "whoever can write there can execute code as you; if you know its code/ and config.yaml, add --trust; "
            f"if it is your own: {repair} {reference_to(run) if '/' in reference_to(run) else run.path}",
        )


def require_folder(path: Path) -> None:
    """Check that a sweep may be executed: as for a run, nobody else may have written it.

    Raises:
        UserError: Somebody else may have.
    """
    try:
        reason = next(_problems(path), None)
    except OSError as error:
        reason = f"{error.filename} cannot be read: {error.strerror}"
    if reason is not None:
        repair = f"chown -R {_user(os.geteuid())}" if " belongs to " in reason else "chmod -R go-w"
        fix = f"whoever can write there can execute code as you; if it is your own: {repair} {_shown(path)}"
        raise UserError(f"{_shown(path)} is not executed: {reason}", fix)


def find_trusted(reference: str | None, runs_dir: Path, trusted: bool = False) -> RunDirectory:
    """Return the run that a command is about to execute.

    Args:
        reference: As in `find`. Without one, the latest run that may be executed; others are skipped with a line.
        runs_dir: The folder of the runs.
        trusted: As in `require`.

    Raises:
        UserError: There is no such run, or it may not be executed.
    """
    if reference is not None or trusted:
        run = find(reference, runs_dir)
        require(run, trusted)
        return run
    find(None, runs_dir)  # raises if there are none
    runs = trusted_among(all_runs(runs_dir)[::-1], stop_at_first=True)
    if not runs:
        raise UserError(f"no run in {runs_dir} is executed without being named", "name one, and add --trust")
    return runs[0]


def trusted_among(runs: list[RunDirectory], stop_at_first: bool = False) -> list[RunDirectory]:
    """Return the runs that may be executed, in order, and print a line for each that is skipped."""
    kept = []
    for run in runs:
        try:
            require(run)
        except UserError as error:
            print(f"trainer: skipped: {error.message}", file=sys.stderr)
            continue
        kept.append(run)
        if stop_at_first:
            break
    return kept


def _problems(path: Path) -> Iterator[str]:
    """Yield what shows that somebody else may have written the run."""
    own = os.lstat(path)
    if stat.S_ISLNK(own.st_mode):  # the name of a run; what it leads to is judged
        own = os.stat(path)
    yield from _of(path, own)
    is_closed = not stat.S_IMODE(own.st_mode) & 0o077  # nobody else reaches what is inside, whatever a umask of 0 gave
    for entry in sorted(path.iterdir()):
        try:
            found = os.lstat(entry)
        except FileNotFoundError:  # a temporary file of a run that is active
            continue
        yield from _owner(entry, found) if is_closed else _of(entry, found)
    if is_closed:
        return
    for name in _EXECUTED:
        yield from _below(path / name)


def _below(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            found = os.lstat(path)
            yield from _of(path, found)
            if stat.S_ISLNK(found.st_mode) and path.suffix in MODULES and path.exists():  # too large for a copy
                yield from _of(path, os.stat(path))


def _owner(path: Path, found: os.stat_result) -> Iterator[str]:
    if found.st_uid not in (0, os.geteuid()):
        yield f"{_shown(path)} belongs to {_user(found.st_uid)}"


def _of(path: Path, found: os.stat_result) -> Iterator[str]:
    yield from _owner(path, found)
    if stat.S_ISLNK(found.st_mode):
        return
    elif found.st_mode & stat.S_IWOTH:
        yield f"everybody may write to {_shown(path)}"
    elif found.st_mode & stat.S_IWGRP and not (_is_private(found.st_gid) and not _has_acl(path)):
        yield f"the group {_group(found.st_gid)} may write to {_shown(path)}"


def _is_private(gid: int) -> bool:
    """Return whether the user is the only member of the group, as ssh decides it."""
    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    if any(member != me.pw_name for member in group.gr_mem):
        return False
    others = [one.pw_name for one in pwd.getpwall() if one.pw_gid == gid and one.pw_uid != me.pw_uid]
    # A directory service may list no users. So a primary group must also have the user's name.
    is_member = me.pw_name in group.gr_mem or (me.pw_gid == gid and group.gr_name == me.pw_name)
    return is_member and not others


def _has_acl(path: Path) -> bool:
    """Return whether an access list may give the rights of the group bits to other users."""
    try:
        return "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False)
    except (OSError, AttributeError):  # a file system without them; not Linux
        return False


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _shown(path: Path) -> str:
    return ascii(str(path))[1:-1]
