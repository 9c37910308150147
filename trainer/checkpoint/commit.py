"""The commit protocol: a checkpoint folder is either complete and checksummed, or it does not exist.

    .staging-attempt-03-step-00000120/      beside the target, so that the last rename stays on one filesystem
        state.pt ...                        written, hashed on the way, fsynced
        COMMIT                              written aside, fsynced, renamed in: sizes and sha256 of every file
    step-00000120/                          the folder, renamed; then the parent is fsynced

Whatever is killed at whatever moment leaves either the old state or the new one. Two generations of one job (an
orphan beside its own rerun) stage under different names, and the second rename onto a full folder fails.
Nothing here imports torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trainer.checkpoint.faults import fault_point
from trainer.core.errors import EnvironmentFault, UserError

FORMAT = 1
"""Version of what is inside a checkpoint folder. A reader refuses a newer one."""
COMMIT = "COMMIT"
STAGING = ".staging-attempt-"
DELETING = ".deleting-"
BAD = "bad-"
_CHUNK_BYTES = 4 << 20


class SaveFailed(EnvironmentFault):
    """A checkpoint could not be written; the earlier ones are untouched."""


@dataclass(frozen=True)
class CommitInfo:
    """What COMMIT says besides the files. Non-finite numbers are stored as null: JSON has none."""

    step: int
    """Optimizer steps completed."""
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of each logged metric at this step."""
    monitor: str | None = None
    """Name of the metric that says which checkpoint is best."""
    monitor_value: float | None = None
    monitor_mode: str | None = None
    """min or max: which values of it are better; null in checkpoints from before it was stored."""
    world_size: int = 1
    strategy: str = "single"
    layout: str = "file"
    """file: state.pt; sharded: torch.distributed.checkpoint and state.pt; deepspeed: its own files and state.pt."""


class _HashingFile:
    """A file for writing that hashes on the way, so that checksums cost no second reading."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.refusal: OSError | None = None
        """Of the file system, for torch.save says something else about it."""

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            fault_point("file.write")
            written = self.file.write(data)
        except OSError as error:
            self.refusal = self.refusal or error
            raise
        self.bytes += written
        return written

    def flush(self) -> None:
        self.file.flush()


class Staging:
    """The folder in which a checkpoint is put together. Not safe for two threads."""

    def __init__(self, target: Path, attempt: int) -> None:
        self.target = target
        self.path = target.parent / f"{STAGING}{attempt:02d}-{target.name}"
        self.files: dict[str, dict[str, Any]] = {}
        """Relative path to {"bytes", "sha256"}, of the files that are written and synced."""

    def create(self) -> None:
        """Make the folder, empty. A leftover of the same name is of a save that failed in this attempt."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        fault_point("staging.created")

    @contextmanager
    def file(self, relative: str) -> Iterator[_HashingFile]:
        """Open a new file for writing; when the block ends it is synced and its checksum known."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as raw:
            fault_point("file.created")
            hashing = _HashingFile(raw)
            try:
                yield hashing
            except Exception as error:
                if hashing.refusal is None or hashing.refusal is error:
                    raise
                raise hashing.refusal from error
            raw.flush()
            fault_point("file.written")
            os.fsync(raw.fileno())
        self.files[relative] = {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}
        fault_point("file.synced")

    def adopt(self, relative: str) -> None:
        """Sync and hash a file that a library has written into the folder by itself."""
        path = self.path / relative
        fault_point("file.written")
        sync(path)
        self.files[relative] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        fault_point("file.synced")

    def discard(self) -> None:
        """Give the space back after a failed save."""
        shutil.rmtree(self.path, ignore_errors=True)


def commit(staging: Staging, info: CommitInfo) -> None:
    """Make the staged checkpoint visible under its target.

    Raises OSError when another generation has committed the same target meanwhile, or the filesystem refuses.
    """
    fault_point("commit.begin")
    content = {
        "format": FORMAT,
        "time": time.time(),
        **asdict(info),
        "metrics": {name: _finite(value) for name, value in info.metrics.items()},
        "monitor_value": _finite(info.monitor_value),
        "files": dict(sorted(staging.files.items())),
    }
    content["digest"] = _digest(content)
    aside = staging.path / f"{COMMIT}.tmp"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fault_point("commit.written")
    os.rename(aside, staging.path / COMMIT)
    for folder in {staging.path, *((staging.path / name).parent for name in staging.files)}:
        sync(folder)
    fault_point("commit.renamed")
    os.rename(staging.path, staging.target)
    fault_point("folder.renamed")
    sync(staging.target.parent)
    fault_point("parent.synced")


def write_checkpoint(
    target: Path, attempt: int, info: CommitInfo, expected_bytes: int, write: Callable[[Staging], None]
) -> bool:
    """Stage, let `write` put the files in, commit. Returns False if the target was already there and good.

    `expected_bytes` is compared with the free space before anything is written.
    Raises SaveFailed with what to do; the staging folder is gone then.
    """
    fault_point("save.begin")
    if already_there(target):
        return False
    staging = Staging(target, attempt)
    try:
        require_space(target.parent, expected_bytes)
        staging.create()
        write(staging)
        commit(staging, info)
    except OSError as error:
        staging.discard()
        raise failed(target, error) from error
    except BaseException:
        staging.discard()
        raise
    return True


def already_there(target: Path) -> bool:
    """Whether the target is committed and intact. Anything else under its name is moved out of the way."""
    if not target.exists():
        return False
    if not verify(target):
        return True
    remove(target)
    return False


def verify(path: Path, checksums: bool = True) -> list[str]:
    """What is wrong with a committed checkpoint folder; empty if nothing. Files that COMMIT does not name are ignored.

    Without `checksums` only sizes are compared, which costs one stat a file.
    """
    try:
        content = read_commit(path)
    except (OSError, ValueError) as error:
        return [f"{COMMIT}: {error}"]
    problems = []
    for relative, expected in content["files"].items():
        file = path / relative
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                problems.append(f"{relative}: {size} bytes instead of {expected['bytes']}")
            elif checksums and sha256(file) != expected["sha256"]:
                problems.append(f"{relative}: checksum differs")
        except OSError as error:
            problems.append(f"{relative}: {error.strerror}")
    return problems


def is_committed(path: Path) -> bool:
    """Whether the folder has a valid COMMIT and every file has its size."""
    return not verify(path, checksums=False)


def read_commit(path: Path) -> dict[str, Any]:
    """The content of COMMIT.

    Raises OSError if there is none, ValueError if it is damaged, UserError if a newer trainer wrote it.
    """
    try:
        content = json.loads((path / COMMIT).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not text: {error.reason}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise ValueError("its own checksum differs")
    if content["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {content['format']}; this trainer reads up to {FORMAT}.",
            "Use the version of trainer that wrote it, or a newer one.",
        )
    return content


def remove(path: Path) -> None:
    """Delete a checkpoint so that it is never seen half deleted: renamed first."""
    doomed = path.parent / f"{DELETING}{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    fault_point("prune.renamed")
    shutil.rmtree(doomed, ignore_errors=True)
    fault_point("prune.removed")


def require_space(folder: Path, expected_bytes: int) -> None:
    """Raise SaveFailed unless the filesystem of `folder` has room for `expected_bytes` and a few files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = os.statvfs(folder)
    free_bytes = found.f_bavail * found.f_frsize
    if free_bytes < expected_bytes:
        raise SaveFailed(
            f"No room for a checkpoint in {folder}: it needs {_size(expected_bytes)}, {_size(free_bytes)} are free.",
            "Free some space, lower checkpoint.keep_last, or put runs_dir on a larger filesystem.",
        )
    if found.f_files and found.f_favail < 16:
        raise SaveFailed(f"No inodes are free in {folder}.", "Delete files there, or put runs_dir elsewhere.")


def failed(target: Path, error: OSError) -> SaveFailed:
    """The error of the operating system as one that says what to do."""
    other_writer = "Another attempt writes to this run; only the newest may."
    fix = {
        errno.ENOSPC: "Free some space, lower checkpoint.keep_last, or put runs_dir on a larger filesystem.",
        errno.EDQUOT: "Your quota is used up: free some space, or put runs_dir elsewhere.",
        errno.EACCES: f"Give yourself the right to write in {target.parent}.",
        errno.EROFS: f"{target.parent} is read-only: put runs_dir elsewhere.",
        errno.ENOTEMPTY: other_writer,
        errno.EEXIST: other_writer,
        errno.ENOENT: other_writer,  # it has cleaned away the staging folder of this one
    }.get(error.errno or 0, f"Look at the filesystem of {target.parent}.")
    return SaveFailed(f"Checkpoint {target.name} could not be written: {error}.", fix)


def sync(path: Path) -> None:
    """fsync a file or a folder (for a folder: the names in it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(content: dict[str, Any]) -> str:
    """Of COMMIT itself, so that a flipped bit in a metric or a step is found, too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _size(count_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.1f} TB"
