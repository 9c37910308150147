"""Lightning's CheckpointIO plugin: saves under the commit protocol, optionally in a background thread.

`Trainer.save_checkpoint(path, storage_options=...)` builds the state on every rank, and `Strategy.save_checkpoint`
calls this plugin on rank 0 only. Errors of a save are therefore not raised where they happen, because rank 0 would miss
the barrier in which the other ranks wait. They are logged, kept, and raised by `CheckpointWriter.raise_if_failed`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from trainer.checkpoint import commit, data_file, hashing
from trainer.checkpoint.commit import CommitInfo, SaveFailed, Staging
from trainer.checkpoint.host_copies import MIB, CopyOptions, HostBuffers, StreamBuffer, choose, nbytes
from trainer.checkpoint.node_disk import NodeDisk
from trainer.checkpoint.plain import plain_checkpoint
from trainer.checkpoint.store import Checkpoint, CheckpointStore
from trainer.checkpoint.uploads import MOST_WAITING, Uploads
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.core.errors import TrainerError, UserError

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
VISIBLE_WITHIN_S = 10.0
"""Maximum time that a folder visible to rank 0 may be invisible to another node: NFS caches directory entries."""


@dataclass
class SaveTiming:
    """Durations of the last save, in seconds."""

    blocked_s: float = 0.0
    """Training was blocked: waiting for the previous save and copying to host memory; synchronous: the whole save."""
    written_s: float = 0.0
    """From the start of writing to the commit."""
    host_bytes: int = 0
    """Host memory that the copies of the state took: buffers, which are kept until the next save."""


class CheckpointWriter:
    """Writes the checkpoints of one rank into a store, one at a time."""

    def __init__(
        self,
        store: CheckpointStore,
        asynchronous: bool = True,
        *,
        on_committed: Callable[[Checkpoint], None] | None = None,
        attempt: int = 0,
        copies: CopyOptions = CopyOptions(),  # noqa: B008  frozen
        uploads: Uploads | None = None,
        disk: NodeDisk | None = None,
    ) -> None:
        self.store = store
        self.asynchronous = asynchronous
        self.on_committed = on_committed
        """Called after each commit, in the background thread if asynchronous."""
        self.attempt = attempt
        self.uploads = uploads
        """Where the checkpoints of `store` are uploaded to; None: nowhere."""
        self.disk = disk
        """The folder of this node's own checkpoints in a job on several nodes; None: there is none."""
        self.timing = SaveTiming()
        self._copies = copies
        self._buffers = HostBuffers(hashing.threads(copies.ranks_on_node))
        self._stream = StreamBuffer(copies.buffer_bytes)
        self._has_said = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: dict[str, Any], target: Path, info: CommitInfo) -> None:
        """Write `state` as the checkpoint `target`, from this process alone.

        Returns as soon as the tensors may change again. Errors are logged, and raised by `raise_if_failed`.
        """
        started = time.monotonic()
        self._wait_for_room()
        read = threading.Event()
        copies = self._takes_snapshot(nbytes(state), ranks_on_node=1)
        try:
            try:
                plain = self._plain(state, copies)
            finally:
                self._buffers.finish()
        except Exception as error:
            self._fail(target, error)
            return

        def write_file(staging: Staging) -> None:
            write_state(staging, plain)  # torch.save copies what is on a device one tensor at a time
            read.set()

        def write() -> bool:
            CheckpointStore(target.parent, info.run).clean_leftovers(self.attempt)
            return commit.write_checkpoint(target, self.attempt, info, nbytes(plain), write_file)

        self._start(target, write, True, None if copies else read)
        self._measure(started)

    def save_sharded(
        self,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        target: Path,
        info: CommitInfo,
        group: torch.distributed.ProcessGroup | None,
        *,
        is_private: bool = False,
    ) -> None:
        """Write `tensors`, sharded over the ranks, and `state` of rank 0 as one checkpoint. Collective.

        Returns and reports errors as `save` does.

        Args:
            tensors: Flat name to this rank's part, or to a whole tensor that no other rank passes.
            state: Everything else; only rank 0's is written.
            target: Folder of the checkpoint.
            info: Content of COMMIT.
            group: A gloo group of all ranks that nothing else uses; None for one process.
            is_private: Whether the tensors are copies in host memory that nothing else uses.
        """
        from trainer.checkpoint.sharded import HostShard, ShardedWrite, in_place, local_bytes, owned, to_host

        started = time.monotonic()
        self._wait_for_room()
        read = threading.Event()
        tensors = owned(tensors)
        copies = not is_private and self._takes_snapshot(local_bytes(tensors), self._copies.ranks_on_node)
        first = group is None or torch.distributed.get_rank(group) == 0
        problem: Exception | None = None
        plain: dict[str, Any] = {}
        parts: dict[str, HostShard] = {}
        try:
            try:
                plain = self._plain(state, self.asynchronous) if first else {}
                parts = to_host(tensors, self._buffers) if copies else in_place(tensors, self._copies.buffer_bytes)
            finally:
                self._buffers.finish()
        except Exception as error:
            problem = error  # raised inside the collective write, where the other ranks learn of it

        def prepared() -> dict[str, HostShard]:
            if problem is not None:
                raise problem
            return parts

        disk = self.disk if self.disk is not None and target.parent == self.disk.directory else None
        write = ShardedWrite(self.attempt, group, self._stream, on_read=read.set, disk=disk)
        self._start(
            target,
            lambda: write.run(target, info, prepared, lambda staging: write_state(staging, plain)),
            first if disk is None else disk.leads,
            None if copies or is_private else read,
        )
        self._measure(started)

    def _takes_snapshot(self, needed_bytes: int, ranks_on_node: int) -> bool:
        """Return whether the tensors are copied before they are written; logs once that they are not."""
        if not self.asynchronous:
            return False
        options = replace(self._copies, ranks_on_node=ranks_on_node)
        if choose(options, needed_bytes, self._buffers.nbytes) == "full":
            return True
        if not self._has_said:
            self._has_said = True
            log.warning(
                "A checkpoint is streamed through %d MB of host memory, and training waits meanwhile: a copy of this"
                " rank's part needs %d MB (checkpoint.snapshot=%s).",
                self._copies.buffer_bytes // MIB,
                needed_bytes // MIB,
                options.snapshot,
            )
        return False

    def _measure(self, started: float) -> None:
        self.timing.blocked_s = time.monotonic() - started
        self.timing.host_bytes = self._buffers.nbytes + self._stream.nbytes

    def _plain(self, state: dict[str, Any], copies: bool) -> dict[str, Any]:
        """Return `state` in plain types; `copies`: the tensors may change before they are written."""
        if copies:
            return plain_checkpoint(state, self._buffers.copy)
        return plain_checkpoint(state, lambda where, tensor: tensor.detach())

    def _start(self, target: Path, write: Callable[[], bool], first: bool, read: threading.Event | None) -> None:
        """Write, if asynchronous in a thread.

        Args:
            target: Folder of the checkpoint.
            write: Writes it; returns False if there was nothing to write.
            first: Whether this rank reports the commit: rank 0, or the first of its node.
            read: Set by `write` once it has read all tensors, for which training has to wait; None: it has copies.
        """
        if not self.asynchronous:
            self._guarded(target, write, first)
            return
        if read is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()  # the thread reads in a stream of its own

        def guarded() -> None:
            try:
                self._guarded(target, write, first)
            finally:
                if read is not None:
                    read.set()

        self._thread = threading.Thread(target=guarded, name="checkpoint-writer")
        self._thread.start()
        if read is not None:
            read.wait()

    def is_on_disk(self, path: Path) -> bool:
        """Return whether the path is of a node's own disk in a job on several nodes, so that it differs by node."""
        return self.disk is not None and self.disk.is_of_tier(path)

    def wait(self) -> None:
        """Wait until no save is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _wait_for_room(self) -> None:
        self.wait()
        if self.uploads is not None:
            self.uploads.wait(MOST_WAITING)

    def finish(self) -> None:
        """Wait until no save is in flight, and everything is uploaded."""
        self.wait()
        if self.uploads is not None:
            self.uploads.close()

    @property
    def in_flight(self) -> bool:
        """Whether a background save is running."""
        return self._thread is not None and self._thread.is_alive()

    def take_failure(self) -> BaseException | None:
        """Return and clear the error of a save since the last call, if any (`checkpoint.on_failure=warn`)."""
        failure, self._failure = self._failure, None
        return failure or (self.uploads.take_failure() if self.uploads is not None else None)

    def raise_if_failed(self) -> None:
        """Raise the error of a save since the last call: SaveFailed, UserError, or an exception of `on_committed`."""
        failure = self.take_failure()
        if failure is not None:
            raise failure

    def _guarded(self, target: Path, write: Callable[[], bool], first: bool) -> None:
        started = time.monotonic()
        try:
            written = write()
            self.timing.written_s = time.monotonic() - started
            if self.uploads is not None and target.parent == self.store.directory:
                self.uploads.submit(target)
            if written and first and self.on_committed is not None:
                self.on_committed(Checkpoint.read(target))
        except BaseException as error:
            self._fail(target, error)

    def _fail(self, target: Path, error: BaseException) -> None:
        expected = isinstance(error, TrainerError)
        log.error("Saving checkpoint %s failed: %s", target.name, error, exc_info=None if expected else error)
        self._failure = error


class RunCheckpointIO(CheckpointIO):
    """Saves checkpoints as folders under the commit protocol, through the run's writer.

    `storage_options` of `Trainer.save_checkpoint` are the fields of `CommitInfo`. A save without them comes from
    user code or from ModelCheckpoint: it writes the file that Lightning would write, at the given path.
    """

    def __init__(self, writer: CheckpointWriter) -> None:
        super().__init__()
        self.writer = writer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint of the run, or Lightning's file for a save by user code."""
        if is_users(path, storage_options, self.writer.store):
            save_as_lightning(checkpoint, path, storage_options)
        else:
            self.writer.save(checkpoint, Path(path), info_of(checkpoint, storage_options))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the state from a checkpoint folder, or from a file that Lightning wrote; onto the CPU by default.

        Only data is read, whatever `weights_only` asks for.

        Raises:
            UserError: The folder is missing, not committed, or has a newer format.
            BadCheckpoint: The file holds more than data.
        """
        return load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint folder or file. Another folder stays."""
        if Path(path).is_dir():
            if not Path(path).is_symlink() and (Path(path) / commit.COMMIT).is_file():
                commit.remove(Path(path))
        else:
            Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Wait for the save in flight."""
        self.writer.wait()


def is_users(path: str | Path, storage_options: Any, store: CheckpointStore) -> bool:
    """Return whether user code requested this save, which is then not a checkpoint of the run."""
    if isinstance(storage_options, CommitInfo) or "step" in (storage_options or {}):
        return False
    return not store.owns(Path(path))


def save_as_lightning(checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
    """Write the file that Lightning's own CheckpointIO writes, from this process alone; plain Lightning loads it."""
    TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)


def info_of(checkpoint: dict[str, Any], storage_options: Any) -> CommitInfo:
    """Return the CommitInfo from `storage_options`: a CommitInfo or a dict of its fields."""
    if isinstance(storage_options, CommitInfo):
        return storage_options
    info = CommitInfo(step=checkpoint.get("global_step", 0), epoch=checkpoint.get("epoch", 0))
    return replace(info, **(storage_options or {}))


def write_state(staging: Staging, state: dict[str, Any]) -> None:
    """Write `state` into the staging folder as `state.pt`."""
    with staging.file(STATE_FILE) as file:
        torch.save(state, cast(IO[bytes], file))


def load_state(path: Path, map_location: Any = "cpu", mapped: bool = False) -> dict[str, Any]:
    """Read the state of a checkpoint folder or file.

    Args:
        path: The folder, or a file that torch.save wrote.
        map_location: Device of the tensors, as in torch.load.
        mapped: Memory-map the file: a tensor is read from disk when it is used.

    Raises:
        UserError: The folder is missing, not committed, or has a newer format.
        BadCheckpoint: It is malformed, or holds more than data.
    """
    if path.is_file():
        file = path
    else:
        wait_visible(path)
        file = commit.listed_file(path, STATE_FILE)
    state = data_file.load(file, map_location, mapped)
    if not isinstance(state, dict):
        raise BadCheckpoint(f"{file} holds a {type(state).__name__}, not a state", "use another checkpoint")
    return state


def wait_visible(path: Path, timeout_s: float = VISIBLE_WITHIN_S) -> None:
    """Wait until the folder is visible and committed.

    Raises:
        UserError: It is not visible and committed after `timeout_s` seconds.
        BadCheckpoint: It is malformed, at once.
    """
    deadline = time.monotonic() + (timeout_s if path.parent.is_dir() else 0.0)
    while True:
        problems = commit.verify(path, checksums=False)
        if not problems:
            return
        try:
            commit.refuse_malformed(path)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{path} is not a checkpoint: {error.message}", error.fix) from None
        if time.monotonic() >= deadline:
            raise UserError(
                f"{path} is not a complete checkpoint ({'; '.join(problems)}).",
                "`trainer show` lists the checkpoints of a run.",
            )
        time.sleep(0.2)


__all__ = ["CheckpointWriter", "RunCheckpointIO", "SaveFailed", "SaveTiming", "load_state"]
