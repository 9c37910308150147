"""Prepare the process of a command: its standard streams, and text in UTF-8."""

from __future__ import annotations

import io
import os
import pwd
import sys

from trainer.core.errors import EnvironmentFault


def use_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding.

    Otherwise names of files in a run directory could not be read back, and files of text would have the encoding of
    whoever wrote them. The processes of a job inherit it.
    """
    if sys.getfilesystemencoding() != "utf-8" and not os.environ.get(_AGAIN):
        from trainer.core.processes import python_module

        sys.stdout.flush()
        os.environ |= {"PYTHONUTF8": "1", _AGAIN: "1"}
        os.execv(sys.executable, python_module("trainer", *sys.argv[1:]))
    os.environ.pop(_AGAIN, None)


_AGAIN = "TRAINER_UTF8"


def require_home() -> None:
    """Check that there is a home directory: libraries that a job imports end without one.

    Raises:
        EnvironmentFault: HOME is not set, and the user is unknown, as in a container with any user id.
    """
    if "HOME" in os.environ:
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        raise EnvironmentFault(
            f"HOME is not set, and user {os.getuid()} has no home directory",
            "set HOME to a folder that you can write, such as: export HOME=/tmp",
        ) from None


def prepare_streams() -> None:
    """Make standard streams usable: closed ones lead to nowhere, and no character is an error.

    Where a stream is closed (`trainer ls >&-`), the next file would get its number, and what is printed here or by a
    job.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                _lead_to_nowhere(number)
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115  until the process ends
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def _lead_to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)
    os.set_inheritable(number, True)
    if nowhere != number:
        os.close(nowhere)
