"""What a command reports of an exception that nothing has foreseen. Imported only then."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback

from trainer.core.errors import EnvironmentFault, TrainerError, UserError

_FIXES = {
    errno.ENOSPC: "free some space, or set runs_dir to a folder on another disk",
    errno.EDQUOT: "your disk quota is exhausted: free some space, or set runs_dir to a folder on another disk",
    errno.EROFS: "it is on a read-only file system; set runs_dir to a folder that you can write",
    errno.EACCES: "get permission for it, or name another",
    errno.EPERM: "get permission for it, or name another",
}


def known(error: Exception) -> TrainerError | None:
    """Return an exception of the operating system that is no bug as one with a fix; None for any other."""
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":  # pathlib
        return UserError("a home directory is not known", "set HOME, and write paths that begin with ~ in full")
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return UserError("the working directory has been deleted", "change to a folder that exists")
    if not isinstance(error, OSError) or error.errno not in _FIXES:
        return None
    if error.filename is None and error.errno in (errno.EACCES, errno.EPERM):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return EnvironmentFault(f"{where}{error.strerror}", _FIXES[error.errno])


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def report(error: Exception, arguments: list[str]) -> str:
    """Return the message of an unexpected exception, and write its traceback to a file for a bug report."""
    message = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="trainer-traceback-", suffix=".txt", delete=False) as file:
            file.write(f"trainer {' '.join(arguments)}\n{''.join(traceback.format_exception(error))}")
    except (OSError, UnicodeEncodeError):
        return f"{message}\n  set TRAINER_TRACEBACK=1 to see the traceback"
    return f"{message}\n  unexpected error; the traceback is in {file.name}"
