"""Copies of remote files on the disk of this node, shared by its processes, up to a limit.

Every file is complete or absent: it is written beside its place and renamed. Locks are flock's, which the system
releases when a process dies. A reader holds a shared lock on what it reads, so that nobody removes that; whoever
downloads holds an exclusive one, so that each file is downloaded once. What a killed process left is written over, or
removed when room is needed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainer.core.errors import EnvironmentFault
from trainer.data.shard_index import IndexedFile

_log = logging.getLogger(__name__)
_LOCK, _PART = ".lock", ".part"
_RETRY_S = 1.0
"""Wait before files are tried again that another process downloads, or for which there was no room."""

Fetch = Callable[[str, IndexedFile, int], None]
"""Writes a file, given its name and what is expected, into an open one (`remote.RemoteFolder.fetch`)."""


def default_folder() -> Path:
    """Return the folder of the user in the temporary directory of this node.

    It is directly there: the system lets nobody else remove or rename it, as others could below a folder of theirs.
    """
    return Path(tempfile.gettempdir()) / f"trainer-shards-{os.getuid()}"


class ShardCache:
    """The files of one remote folder, in a subfolder of the cache.

    The least recently opened files of the whole cache are removed first. Where all are being read and there is no room,
    a file that is needed now exceeds the limit; one that is prefetched waits.

    Args:
        root: Folder of the cache.
        name: Subfolder, which stands for the remote folder and its index.
        max_bytes: Limit of the whole cache.
        fetch: Downloads a file.

    Raises:
        EnvironmentFault: The folder belongs to another user.
    """

    def __init__(self, root: Path, name: str, max_bytes: int, fetch: Fetch) -> None:
        self.root, self.folder, self.max_bytes, self._fetch = root, root / name, max_bytes, fetch
        for folder in (*reversed(root.parents), root, self.folder):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
        if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
            raise EnvironmentFault(f"data.cache={root} belongs to another user", "set data.cache to a folder of yours")

    def open(self, name: str, expected: IndexedFile) -> BinaryIO:
        """Return a file, after downloading it unless it is here; it stays here until it is closed."""
        while True:
            file = self._existing(name, expected)
            if file is not None:
                return file
            self._download(name, expected, needs_it_now=True)

    def prefetch(self, name: str, expected: IndexedFile) -> bool:
        """Download a file unless it is here, and return whether it is; False: no room, or another process does."""
        if (self.folder / name).is_file():
            return True
        return self._download(name, expected, needs_it_now=False)

    def _existing(self, name: str, expected: IndexedFile) -> BinaryIO | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        _flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        if not found.st_nlink:  # removed before it was locked
            os.close(descriptor)
            return None
        if found.st_size != expected.bytes:  # after a crash of the machine
            (self.folder / name).unlink(missing_ok=True)
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return os.fdopen(descriptor, "rb")

    def _download(self, name: str, expected: IndexedFile, needs_it_now: bool) -> bool:
        part, path = self.folder / f".{name}{_PART}", self.folder / name
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _flock(descriptor, fcntl.LOCK_EX, waits=needs_it_now):
                return False
            if not _is(part, descriptor) or path.is_file():  # another process was faster, or removed it
                return path.is_file()
            if not self._reserve(descriptor, expected.bytes, needs_it_now):
                part.unlink()
                return False
            try:
                self._fetch(name, expected, descriptor)
                os.fsync(descriptor)
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return True
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int, size: int, needs_it_now: bool) -> bool:
        """Give the file its size, after removing others if necessary; False: there is no room."""
        with self._locked():
            os.ftruncate(descriptor, 0)
            excess = self._remove(size)
            if excess > 0:
                if not needs_it_now:
                    return False
                _log.warning(
                    "data.cache=%s: all files are being read, so it exceeds data.cache_gb by %.1f GB",
                    *(self.root, excess / 1e9),
                )
            os.ftruncate(descriptor, size)
        return True

    def _remove(self, room: int) -> int:
        """Remove the files that were opened longest ago until there is room; return the bytes that are missing."""
        files = []
        for path in self.root.glob("*/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            files.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(size for _, size, _ in files) + room - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            if _removed_unless_in_use(path):
                excess -= size
        return excess

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Prefetcher:
    """Downloads files in the background, in a thread that ends when none is left.

    Args:
        download: Downloads a file, and returns whether it is here.
    """

    def __init__(self, download: Callable[[str], bool]) -> None:
        self._download = download
        self._lock = threading.Condition()
        self._wanted: list[str] = []
        self._thread: threading.Thread | None = None

    def want(self, names: Sequence[str]) -> None:
        """Download these files, in this order, in place of those that were wanted before."""
        with self._lock:
            self._wanted = list(names)
            self._lock.notify()
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        number = 0
        while True:
            with self._lock:
                if number >= len(self._wanted):
                    if number:  # each was tried
                        self._lock.wait(_RETRY_S)
                    number = 0
                if not self._wanted:
                    self._thread = None
                    return
                name = self._wanted[number]
            is_here = self._try(name)
            with self._lock:
                if is_here and name in self._wanted:
                    self._wanted.remove(name)
                elif not is_here:
                    number += 1

    def _try(self, name: str) -> bool:
        try:
            return self._download(name)
        except Exception as error:
            _log.warning("prefetching %s: %s", name, error)
            return True  # whoever needs it tries again, and reports it


def _flock(descriptor: int, kind: int, waits: bool = True) -> bool:
    """Lock an open file, and return whether it is locked.

    Raises:
        EnvironmentFault: The file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind if waits else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EnvironmentFault(f"data.cache: the file system has no locks: {error}", "use a disk of the node") from None
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Return whether an open file still has this path."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _removed_unless_in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not _flock(descriptor, fcntl.LOCK_EX, waits=False):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
