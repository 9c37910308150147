"""The checkpoints of a run in an object store (`checkpoint.dir`), beside those in the run directory.

    <checkpoint.dir>/<run>/step-00000120/COMMIT             the COMMIT of the run directory, written last
    <checkpoint.dir>/<run>/step-00000120/<digest>/state.pt  its files; the digest is the beginning of COMMIT's

A checkpoint is committed in the run directory first and then uploaded. The digest covers the checksums of all files, so
that what another attempt has left of the same step is never mixed with it. COMMIT is created when all files are there,
and only if there is none; a reader also compares their sizes. Deleting begins with COMMIT. So a checkpoint is whole, or
it is invisible, whatever dies when. This module does not import torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit, remote_record, wellformed
from trainer.checkpoint.commit import COMMIT, Commit, Staging
from trainer.checkpoint.faults import fault_point
from trainer.checkpoint.object_store import Exists, Object, ObjectStore
from trainer.checkpoint.store import Checkpoint, CheckpointStore, in_order, is_named_as_checkpoint, kept
from trainer.core.errors import EnvironmentFault, UserError

STALLED_AFTER_S = 1800.0
"""Longest time without a new object of another rank until an upload has failed."""
_DIGEST_LENGTH = 16


@dataclass(frozen=True)
class _Held:
    """A COMMIT in the object store."""

    content: Commit
    raw: bytes
    digest: str


class RemoteStore:
    """The checkpoints of one run below `checkpoint.dir`.

    Args:
        objects: The objects of the run: `<checkpoint.dir>/<run>`.
        local: The checkpoints in the run directory; a checkpoint that is fetched becomes one of them.
    """

    may_write: Callable[[], None]
    """Raises if a newer attempt of the run has begun; called before anything becomes visible."""

    def __init__(self, objects: ObjectStore, local: CheckpointStore) -> None:
        self.objects, self.local = objects, local
        self.may_write = lambda: None
        self._read: dict[tuple[str, Object], _Held | None] = {}

    def committed(self) -> list[Checkpoint]:
        """Return the whole checkpoints by step, oldest first, with the paths that they would be fetched to."""
        found = self._whole(self.objects.objects())
        return in_order(Checkpoint.of(self.local.directory / name, held.content) for name, held in found.items())

    def holds(self, path: Path) -> bool:
        """Return whether the checkpoint in this folder is in the store, whole."""
        held = self._whole(self.objects.objects(path.name)).get(path.name)
        return held is not None and held.raw == (path / COMMIT).read_bytes()

    def upload(self, path: Path, rank: int = 0, ranks: int = 1) -> bool:
        """Upload this rank's part of a committed checkpoint; rank 0 makes it visible when all parts are there.

        Each of `ranks` ranks sends the files that a rank of its number wrote. They do not wait for each other; rank 0
        lists the objects until it finds all.

        Returns:
            False if a newer attempt has uploaded another checkpoint of this name.

        Raises:
            EnvironmentFault: The server has failed for too long, or files of other ranks did not arrive.
            OSError, ValueError: The folder is not a committed checkpoint any more.
        """
        fault_point("upload.begin")
        content, raw = commit.read_commit(path), (path / COMMIT).read_bytes()
        folder = f"{path.name}/{_digest_of(raw)}"
        for relative in content.files:
            if commit.writer_of(relative) % ranks == rank:
                self.objects.put_file(path / relative, f"{folder}/{relative}")
                fault_point("upload.file")
        if rank != 0:
            return True
        self._wait_for_all(folder, content)
        fault_point("upload.files")
        return self._commit(path.name, content, raw)

    def _wait_for_all(self, folder: str, content: Commit) -> None:
        deadline, before, pause = time.monotonic() + STALLED_AFTER_S, -1, 0.1
        while True:
            found = self.objects.objects(folder)
            missing = _missing(found, folder, content)
            if not missing:
                return
            if len(found) > before:
                deadline, before = time.monotonic() + STALLED_AFTER_S, len(found)
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"checkpoint.dir: {len(missing)} files of {folder} have not arrived, such as {missing[0]}",
                    "see the logs of the other ranks",
                )
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _commit(self, name: str, content: Commit, raw: bytes) -> bool:
        self.may_write()
        try:
            self.objects.create(f"{name}/{COMMIT}", raw)
        except Exists:
            held = self._held(name, self.objects.objects(name).get(f"{name}/{COMMIT}"))
            if held is not None and held.content.time > content.time:
                return False
            self.remove(name, but=_digest_of(raw))  # of an earlier attempt, or before `on_train_end`
            self.objects.create(f"{name}/{COMMIT}", raw)
        fault_point("upload.committed")
        self._delete_other_files(name, _digest_of(raw))
        return True

    def _delete_other_files(self, name: str, digest: str) -> None:
        keep = (f"{name}/{COMMIT}", f"{name}/{digest}/")
        self.objects.delete([key for key in self.objects.objects(name) if not key.startswith(keep)])

    def remove(self, name: str, but: str | None = None) -> None:
        """Delete a checkpoint, COMMIT first; `but`: the digest of files that stay."""
        self.objects.delete([f"{name}/{COMMIT}"])
        fault_point("remote.removed")
        found = self.objects.objects(name)
        self.objects.delete([key for key in found if but is None or not key.startswith(f"{name}/{but}/")])

    def prune(self, keep_last: int, keep_best: int = 0, keep_every_n_steps: int | None = None) -> list[Checkpoint]:
        """Delete the checkpoints that no rule keeps, as `CheckpointStore.prune`; returns those that are left."""
        checkpoints = self.committed()
        keep = kept(checkpoints, keep_last, keep_best, keep_every_n_steps=keep_every_n_steps)
        left = []
        for checkpoint in checkpoints:
            if checkpoint.step not in keep and checkpoint.run in (self.local.run, None):
                self.remove(checkpoint.path.name)
            else:
                left.append(checkpoint)
        return left

    def clean_leftovers(self) -> None:
        """Delete files of checkpoints without COMMIT that are not in the run directory. Not while an upload runs."""
        self.objects.abort_unfinished()
        found = self.objects.objects()
        names = {key.partition("/")[0] for key in found}
        for name in names:
            path = self.local.directory / name
            if f"{name}/{COMMIT}" not in found and is_named_as_checkpoint(path) and not commit.is_committed(path):
                self.objects.delete([key for key in found if key.startswith(f"{name}/")])

    def record(self, checkpoints: list[Checkpoint]) -> None:
        """Write what the store holds to `checkpoints/remote.json`."""
        remote_record.write(self.local.directory, self.objects.url, checkpoints)

    def download(self, name: str, staging: Staging, rank: int = 0, ranks: int = 1) -> list[str]:
        """Write this rank's part of the files of a checkpoint into a staging folder, and compare the checksums.

        Returns:
            The files whose checksums differ, or that are gone.
        """
        held = self._require(name)
        problems = []
        for relative, expected in held.content.files.items():
            if commit.writer_of(relative) % ranks != rank:
                continue
            try:
                with staging.file(relative) as file:
                    for piece in self.objects.pieces(f"{name}/{held.digest}/{relative}", expected.bytes):
                        file.write(piece)
            except FileNotFoundError:
                problems.append(f"{relative}: it is not there")
                continue
            if staging.files[relative] != expected:
                problems.append(f"{relative}: checksum differs")
        return problems

    def publish(self, name: str, staging: Staging) -> None:
        """Make a downloaded checkpoint one of the run directory, with the COMMIT that it was uploaded with."""
        commit.publish(staging, self._require(name).raw)

    def fetch(self, name: str) -> Path:
        """Download a checkpoint into the run directory, from this process alone.

        Raises:
            UserError: It is damaged.
            SaveFailed: The run directory has no room for it.
        """
        staging = self.staging(name, attempt=0)
        try:
            problems = self.download(name, staging)
            if problems:
                raise UserError(
                    f"{self.objects.url}/{name} is damaged: {'; '.join(problems)}", "use another: --checkpoint=STEP"
                )
            self.publish(name, staging)
        except OSError as error:
            raise commit.failed(staging.target, error) from error
        finally:
            staging.discard()
        return staging.target

    def staging(self, name: str, attempt: int) -> Staging:
        """Create the staging folder of a download; what is at its target and not a checkpoint is set aside."""
        self.local.require_real()
        target = self.local.directory / name
        commit.require_space(target.parent, sum(one.bytes for one in self._require(name).content.files.values()))
        commit.already_committed(target)
        staging = Staging(target, attempt, self.local.run)
        staging.create()
        return staging

    def verify(self, name: str) -> list[str]:
        """Return the problems of a checkpoint in the store: reads every file and compares the checksums."""
        held = self._require(name)
        problems = []
        for relative, expected in held.content.files.items():
            digest = commit.new_digest()
            try:
                for piece in self.objects.pieces(f"{name}/{held.digest}/{relative}", expected.bytes):
                    digest.update(piece)
            except FileNotFoundError:
                problems.append(f"{relative}: it is not there")
                continue
            if digest.hexdigest() != expected.sha256:
                problems.append(f"{relative}: checksum differs")
        return problems

    def _require(self, name: str) -> _Held:
        held = self._held(name, self.objects.objects(name).get(f"{name}/{COMMIT}"))
        if held is None:
            raise UserError(f"{self.objects.url}/{name} is not a complete checkpoint.", "`trainer show` lists them.")
        return held

    def _whole(self, found: Mapping[str, Object]) -> dict[str, _Held]:
        """Return the COMMITs of a listing whose files are all there."""
        whole = {}
        for key, one in found.items():
            name, _, rest = key.partition("/")
            if rest != COMMIT or not is_named_as_checkpoint(Path(name)):
                continue
            held = self._held(name, one)
            if held is not None and not _missing(found, f"{name}/{held.digest}", held.content):
                whole[name] = held
        return whole

    def _held(self, name: str, one: Object | None) -> _Held | None:
        """Return a COMMIT; None if there is none, or it cannot be read."""
        if one is None or one.bytes > wellformed.LARGEST_JSON_BYTES:
            return None
        if (name, one) not in self._read:
            try:
                raw = self.objects.read(f"{name}/{COMMIT}", one.bytes)
                content = commit.parsed(json.loads(raw), Path(name))
                self._read[name, one] = _Held(content, raw, _digest_of(raw)) if _is_of(name, content) else None
            except FileNotFoundError:  # deleted in the meantime
                return None
            except (ValueError, UserError, RecursionError):
                self._read[name, one] = None
        return self._read[name, one]


def _is_of(name: str, content: Commit) -> bool:
    return int(name.split("-")[1]) == content.step


def _digest_of(raw: bytes) -> str:
    content: Any = json.loads(raw)
    return str(content["digest"])[:_DIGEST_LENGTH]


def _missing(found: Mapping[str, Object], folder: str, content: Commit) -> list[str]:
    """Return the files of COMMIT that a listing does not have, or not in their size."""
    return [
        relative
        for relative, one in content.files.items()
        if (there := found.get(f"{folder}/{relative}")) is None or there.bytes != one.bytes
    ]
