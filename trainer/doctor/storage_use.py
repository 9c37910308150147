"""Use a file system and see what it does: `python -m trainer.doctor.storage_use FOLDER MEGABYTES`.

Prints `StorageFacts` as JSON. A process of its own, because one that waits for a dead file server cannot be stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.core import processes, records
from trainer.doctor.facts import StorageFacts

_RENAMES, _SMALL = 200, 4096
_LOCKS: dict[str, Callable[[BinaryIO], None]] = {
    "flock": lambda file: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "fcntl": lambda file: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
}


def main(folder: str, megabytes: str) -> int:
    """Use the folder and print the facts; returns the exit code."""
    try:
        facts = use(Path(folder), int(megabytes) << 20)
    except OSError as problem:
        facts = StorageFacts(problem=f"{problem.filename or folder}: {problem.strerror or problem}")
    sys.stdout.write(records.dumps(facts) + "\n")
    return 0


def use(folder: Path, size: int) -> StorageFacts:
    """Write, read, rename and lock in a folder inside `folder`, which is removed afterwards.

    Raises:
        OSError: The file system refuses something that a run needs.
    """
    place = Path(tempfile.mkdtemp(dir=folder, prefix=".trainer-doctor-"))
    try:
        written, read = _write(place / "large", size), _read(place / "large")
        renames_s, torn = _rename(place)
        return StorageFacts(
            write_bytes_s=written,
            read_bytes_s=read,
            renames_s=renames_s,
            torn=torn,
            unlocked=_unlocked(place / "lock"),
            has_links=_has_links(place),
            skew_s=_skew(place / "stamp"),
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write(path: Path, size: int) -> float:
    block = os.urandom(1 << 20)  # file systems compress zeros
    began = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - began)


def _read(path: Path) -> float:
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is measured
        began, size = time.perf_counter(), 0
        while block := file.read(1 << 20):
            size += len(block)
    return size / (time.perf_counter() - began)


def _rename(place: Path) -> tuple[float, str]:
    """Rename files over each other while a second process reads; return the rate, and what it saw."""
    path, done = place / "record", place / "done"
    path.write_text("0" * _SMALL)
    with _second(place, "watch") as watcher:
        _wait_for(place / "watching")
        began = time.perf_counter()
        for number in range(_RENAMES):
            temporary = place / "record.new"
            with open(temporary, "w") as file:
                file.write(str(number % 10) * _SMALL)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        rate = _RENAMES / (time.perf_counter() - began)
        done.touch()
        out, _ = watcher.communicate(timeout=20)
    return rate, out.strip()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _watch(place: Path) -> str:
    """Return what was wrong in the file while it was replaced; empty: it was always there, and whole."""
    deadline = time.monotonic() + 15
    (place / "watching").touch()
    while not (place / "done").exists() and time.monotonic() < deadline:
        try:
            text = (place / "record").read_text()
        except FileNotFoundError:
            return "a file was missing while another was renamed over it"
        if len(text) != _SMALL or len(set(text)) != 1:
            return "a file was incomplete while another was renamed over it"
    return ""


def _unlocked(path: Path) -> list[str]:
    """Return the kinds of lock that a second process got, too, or that are refused."""
    open_to_others = []
    for kind, lock in _LOCKS.items():
        with open(path, "wb") as file:
            try:
                lock(file)
            except OSError:
                open_to_others.append(kind)
                continue
            with _second(path, kind) as other:
                out, _ = other.communicate(timeout=20)
            if out.strip() != "kept out":
                open_to_others.append(kind)
    return open_to_others


def _try_lock(path: Path, kind: str) -> str:
    with open(path, "r+b") as file:
        try:
            _LOCKS[kind](file)
        except OSError:
            return "kept out"
    return "locked"


def _has_links(place: Path) -> bool:
    try:
        os.link(place / "record", place / "link")
    except OSError:
        return False
    return os.stat(place / "record").st_nlink == 2


def _skew(path: Path) -> float:
    before = time.time()
    with open(path, "wb") as file:
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
    written, after = path.stat().st_mtime, time.time()
    # The kernel's time stamps are those of its last tick, up to 10 ms before.
    return written - after if written > after else min(0.0, written - before + 0.01)


@contextlib.contextmanager
def _second(path: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    command = processes.python_module("trainer.doctor.storage_use", "--second", str(path), what)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _as_second(path: str, what: str) -> int:
    answer = _watch(Path(path)) if what == "watch" else _try_lock(Path(path), what)
    sys.stdout.write(answer + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_as_second(*sys.argv[2:]) if sys.argv[1] == "--second" else main(*sys.argv[1:]))
