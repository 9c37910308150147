"""Locks of open files: taken, held by another, and on a file system that has none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from trainer.core.locks import locked_or_closed, try_lock


def test_a_lock_is_one_descriptors_until_it_is_closed(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert (try_lock(first), try_lock(second)) == (True, False)
    assert locked_or_closed(second) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)
    os.close(first)
    third = os.open(tmp_path / "lock", os.O_RDWR)
    assert locked_or_closed(third) == third
    os.close(third)


def test_a_file_system_without_locks_is_told_from_a_lock_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        assert try_lock(file.fileno()) is None
    assert locked_or_closed(os.open(tmp_path / "lock", os.O_RDWR)) is None
