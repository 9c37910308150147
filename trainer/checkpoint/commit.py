"""The commit protocol: a checkpoint folder is either complete and checksummed, or it does not exist.

    .staging-attempt-03-step-00000120/      next to the target, so that the final rename stays on one filesystem
        state.pt ...                        hashed and sent to the disk while it is written, then fsynced
        COMMIT                              sizes and sha256 of every file; written aside, fsynced, renamed
    step-00000120/                          the renamed staging folder; then the parent folder is fsynced

A kill at any moment leaves either the old state or the new one. Two attempts of one job that run at the same time (an
orphan and its replacement) stage under different names, and a rename onto a folder that is not empty fails.
This module does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint import wellformed
from trainer.checkpoint.faults import fault_point
from trainer.checkpoint.hashing import HashingFile
from trainer.checkpoint.hashing import checksums as checksums_of
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.files import sync
from trainer.core.records import BadRecord, absent, from_json, to_json

FORMAT = 2
"""Version of the checkpoint folder's format. A reader refuses a newer one.

Format 2 describes shards in JSON (`sharded.py`); format 1, in a pickle. A single file has format 1 in both.
"""
COMMIT = "COMMIT"
STAGING = ".staging-attempt-"
DELETING = ".deleting-"
BAD = "bad-"
_SHARD = re.compile(r"shards/__([0-9]{1,9})_[0-9]+\.distcp")
"""Name that torch.distributed.checkpoint gives a file; the group is the rank."""


class SaveFailed(EnvironmentFault):
    """Writing a checkpoint failed; earlier checkpoints are untouched."""


@dataclass(frozen=True)
class CommitInfo:
    """Metadata that the writer of a checkpoint records. Non-finite numbers are stored as null: JSON has none."""

    step: int
    """Optimizer steps completed."""
    epoch: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Last logged value of each metric at this step."""
    monitor: str | None = None
    """Name of the metric that ranks the checkpoints."""
    monitor_value: float | None = None
    monitor_mode: Literal["min", "max"] | None = None
    """Whether lower or higher is better; null in checkpoints that do not store it."""
    world_size: int = 1
    strategy: str = "single"
    layout: Literal["file", "sharded"] = "file"
    """file: state.pt alone; sharded: torch.distributed.checkpoint shards and state.pt."""
    run: str | None = None
    """Id of the run that wrote it; null in checkpoints that do not store it. Retention deletes only its own."""
    save_id: str | None = absent()
    """Of a folder with the files of one node, which is a part of a checkpoint (`node_disk.py`): the same on all."""


@dataclass(frozen=True)
class StoredFile:
    """Size and checksum of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Commit(CommitInfo):
    """The content of COMMIT without its own checksum."""

    format: int
    time: float
    """Seconds since 1970 at the commit."""
    files: dict[str, StoredFile]
    """Files by path, relative to the folder."""


class Staging:
    """The folder in which a checkpoint is assembled. Not thread-safe."""

    def __init__(self, target: Path, attempt: int, run: str | None = None) -> None:
        self.target = target
        self.run = run
        self.path = target.parent / f"{STAGING}{attempt:02d}-{target.name}{suffix_of(run)}"
        self.files: dict[str, StoredFile] = {}
        """The files that are written and synced, by path relative to the folder."""

    def create(self) -> None:
        """Create the empty folder. A leftover of the same name is from a failed save of this attempt."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        fault_point("staging.created")

    @contextmanager
    def file(self, relative: str) -> Iterator[HashingFile]:
        """Open a new file for writing; at the end of the block it is synced and its checksum recorded."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as raw, HashingFile(raw) as hashing:
            fault_point("file.created")
            try:
                yield hashing
            except Exception as error:
                if hashing.error is None or hashing.error is error:
                    raise
                raise hashing.error from error
            if hashing.error is not None:  # which the caller has not passed on
                raise hashing.error
            raw.flush()
            fault_point("file.written")
            os.fsync(raw.fileno())
        self.files[relative] = StoredFile(hashing.bytes, hashing.hexdigest())
        fault_point("file.synced")

    def discard(self) -> None:
        """Delete the folder after a failed save."""
        shutil.rmtree(self.path, ignore_errors=True)


def commit(staging: Staging, info: CommitInfo) -> None:
    """Make the staged checkpoint visible at its target path.

    Raises:
        OSError: Another attempt has committed the same target in the meantime, or the filesystem reports an error.
    """
    fault_point("commit.begin")
    given = {one.name: getattr(info, one.name) for one in fields(CommitInfo)}
    given["metrics"] = {name: _finite(value) for name, value in info.metrics.items()}
    given["monitor_value"] = _finite(info.monitor_value)
    version = format_of(info.layout)
    # In microseconds: beyond them a changed digit may give the same float, which the digest could not detect.
    publish(staging, _encoded(Commit(**given, format=version, time=round(time.time(), 6), files=staging.files)))


def publish(staging: Staging, content: bytes) -> None:
    """Make the staged files visible at their target path, with this COMMIT. Raises as `commit`."""
    _write_commit(staging.path, content)
    for folder in {staging.path, *((staging.path / name).parent for name in staging.files)}:
        sync(folder)
    fault_point("commit.renamed")
    os.rename(staging.path, staging.target)
    fault_point("folder.renamed")
    sync(staging.target.parent)
    fault_point("parent.synced")


def extend(path: Path, files: dict[str, StoredFile]) -> None:
    """Add files, which are in the folder of a checkpoint and synced, to its COMMIT."""
    content = read_commit(path)
    for folder in {(path / relative).parent for relative in files}:
        sync(folder)
    _write_commit(path, _encoded(replace(content, files=content.files | files)))
    sync(path)


def _encoded(content: Commit) -> bytes:
    encoded = to_json(replace(content, files=dict(sorted(content.files.items()))))
    encoded["digest"] = _digest(encoded)
    return json.dumps(encoded, indent=1).encode()


def _write_commit(folder: Path, content: bytes) -> None:
    temporary = folder / f"{COMMIT}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fault_point("commit.written")
    os.rename(temporary, folder / COMMIT)


def write_checkpoint(
    target: Path, attempt: int, info: CommitInfo, expected_bytes: int, write: Callable[[Staging], None]
) -> bool:
    """Write one checkpoint under the commit protocol, from this process alone.

    Args:
        target: Folder of the checkpoint.
        attempt: Number of the attempt; it is part of the name of the staging folder.
        info: Content of COMMIT.
        expected_bytes: Compared with the free space before anything is written.
        write: Puts the files into the staging folder.

    Returns:
        False if the target was already committed and intact.

    Raises:
        SaveFailed: The operating system reported an error. The staging folder has been deleted.
    """
    fault_point("save.begin")
    if already_committed(target):
        return False
    staging = Staging(target, attempt, info.run)
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


def format_of(layout: str) -> int:
    """Return the oldest format that describes this layout, so that older releases can read what they know."""
    return FORMAT if layout == "sharded" else FORMAT - 1


def suffix_of(run: str | None) -> str:
    """Return what the name of a staged or half deleted checkpoint has at its end: the id of its run."""
    return f".{run}" if run else ""


def already_committed(target: Path) -> bool:
    """Return whether the target is committed and intact. Anything else under its name is set aside."""
    if not os.path.lexists(target):
        return False
    if not target.is_symlink() and not verify(target):
        return True
    set_aside(target)
    return False


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be used to `bad-...`; what is there already keeps its name."""
    bad, number = path.parent / f"{BAD}{path.name}", 1
    while os.path.lexists(bad):
        number += 1
        bad = path.parent / f"{BAD}{path.name}.{number}"
    os.rename(path, bad)


def verify(path: Path, checksums: bool = True, only: Callable[[str], bool] = lambda relative: True) -> list[str]:
    """Return the problems of a checkpoint folder; an empty list if it is intact.

    Files that COMMIT does not list are ignored.

    Args:
        path: Folder of the checkpoint.
        checksums: False compares only sizes, which costs one `stat` per file.
        only: Whether the checksum of a file is compared, by its path relative to the folder.
    """
    problems = _problems(path, only if checksums else lambda relative: False)
    return [problem.message if isinstance(problem, BadCheckpoint) else problem for problem in problems]


def refuse_malformed(path: Path) -> None:
    """Check that COMMIT is well-formed and lists only regular files; that a file is missing is not checked.

    Raises:
        BadCheckpoint: With the first problem that waiting or a restart does not cure.
    """
    for problem in _problems(path, lambda relative: False):
        if isinstance(problem, BadCheckpoint):
            raise problem


def _problems(path: Path, compares: Callable[[str], bool]) -> Iterator[BadCheckpoint | str]:
    """Yield the problems: as BadCheckpoint what is malformed, as text what is missing or damaged."""
    try:
        content = read_commit(path)
    except BadCheckpoint as error:
        yield error
        return
    except (OSError, ValueError) as error:
        yield f"{COMMIT}: {error}"
        return
    right_size = []
    for relative, expected in content.files.items():
        try:
            size = wellformed.size_of(path, relative)
            if size != expected.bytes:
                yield f"{relative}: {size} bytes instead of {expected.bytes}"
            elif compares(relative):
                right_size.append(relative)
        except BadCheckpoint as error:
            yield error
        except OSError as error:
            yield f"{relative}: {error.strerror}"
    found = checksums_of(path / relative for relative in right_size)
    for relative, checksum in zip(right_size, found, strict=True):
        if isinstance(checksum, OSError):
            yield f"{relative}: {checksum.strerror}"
        elif checksum != content.files[relative].sha256:
            yield f"{relative}: checksum differs"


def writer_of(relative: str) -> int:
    """Return the number of the rank that wrote a file of a checkpoint, from its path relative to the folder."""
    match = _SHARD.fullmatch(relative)
    return int(match[1]) if match else 0


def is_committed(path: Path) -> bool:
    """Return whether the folder has a valid COMMIT and every file has the recorded size."""
    return not verify(path, checksums=False)


def read_commit(path: Path) -> Commit:
    """Read COMMIT.

    Raises:
        OSError: COMMIT does not exist.
        ValueError: COMMIT is damaged.
        BadCheckpoint: COMMIT is malformed: not a regular file, or with a path that leads out of the folder.
        UserError: A newer version of trainer wrote it.
    """
    return parsed(wellformed.read_json(path, COMMIT), path)


def parsed(content: Any, path: Path) -> Commit:
    """Return the content of the COMMIT of the folder `path`, which may be in an object store, checked.

    Raises as `read_commit`.
    """
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise ValueError("digest mismatch")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {content['format']}; this version of trainer reads formats up to {FORMAT}.",
            "Use the version of trainer that wrote it, or a newer one.",
        )
    try:
        read = from_json(Commit, content, path / COMMIT)
    except BadRecord as error:
        raise ValueError(error.message) from None
    for problem in wellformed.problems_of_commit(read, COMMIT):
        raise wellformed.malformed(path, f"{COMMIT}: {problem}")
    return read


def listed_file(path: Path, relative: str) -> Path:
    """Return the path of a file that a checkpoint consists of.

    Raises:
        BadCheckpoint: COMMIT does not list it, or it is not a regular file.
        OSError, ValueError, UserError: As `read_commit`.
    """
    if relative not in read_commit(path).files:
        raise wellformed.malformed(path, f"{COMMIT} does not list {relative}")
    wellformed.size_of(path, relative)
    return path / relative


def remove(path: Path, run: str | None = None) -> None:
    """Delete a checkpoint. It is renamed first, so that no reader sees it half deleted.

    Args:
        path: Folder of the checkpoint.
        run: Id of its run, by which what an interrupted deletion leaves is recognized.
    """
    doomed = path.parent / f"{DELETING}{path.name}{suffix_of(run)}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    fault_point("prune.renamed")
    shutil.rmtree(doomed, ignore_errors=True)
    fault_point("prune.removed")


def require_space(folder: Path, expected_bytes: int) -> None:
    """Raise SaveFailed unless the filesystem of `folder` has room for `expected_bytes` and a few files."""
    folder.mkdir(parents=True, exist_ok=True)
    filesystem = os.statvfs(folder)
    free_bytes = filesystem.f_bavail * filesystem.f_frsize
    if free_bytes < expected_bytes:
        raise SaveFailed(
            f"Not enough space for a checkpoint in {folder}: needs {_size(expected_bytes)}, {_size(free_bytes)} free.",
            "Free some space, lower checkpoint.keep_last, or put runs_dir on a larger filesystem.",
        )
    if filesystem.f_files and filesystem.f_favail < 16:
        raise SaveFailed(f"No free inodes in {folder}.", "Delete files there, or put runs_dir elsewhere.")


def failed(target: Path, error: OSError) -> SaveFailed:
    """Return the error of the operating system as a SaveFailed with a fix."""
    return SaveFailed(f"Checkpoint {target.name} could not be written: {error}.", fix_of(error, target))


def fix_of(error: BaseException, target: Path) -> str:
    """Return what helps against an error in writing a checkpoint; empty if that is not known."""
    if isinstance(error, TrainerError):
        return error.fix
    if not isinstance(error, OSError):
        return ""
    other_writer = "Another attempt is writing to this run; only the newest attempt may."
    return {
        errno.ENOSPC: "Free some space, lower checkpoint.keep_last, or put runs_dir on a larger filesystem.",
        errno.EDQUOT: "Your disk quota is exhausted: free some space, or put runs_dir elsewhere.",
        errno.EACCES: f"Get write permission for {target.parent}.",
        errno.EROFS: f"{target.parent} is read-only: put runs_dir elsewhere.",
        errno.ENOTEMPTY: other_writer,
        errno.EEXIST: other_writer,
        errno.ENOENT: other_writer,  # it has deleted this attempt's staging folder
    }.get(error.errno or 0, f"Check the filesystem of {target.parent}.")


def new_digest() -> Any:
    """Return a new hash object of the algorithm of COMMIT's checksums."""
    return hashlib.sha256()


def _digest(content: dict[str, Any]) -> str:
    """Return the checksum of COMMIT itself: a flipped bit in a metric or a step is detected, too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _size(count_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.1f} TB"
