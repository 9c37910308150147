"""Files that are hashed and sent to the disk while they are written: the same bytes, whatever fails, when and where."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import commit, hashing, shard_index, writeback
from trainer.checkpoint.commit import CommitInfo, SaveFailed, Staging
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.checkpoint.writeback import Writeback

KIB = 1 << 10
PIECE = 64 * KIB
SHARDED = CommitInfo(step=1, layout="sharded")
REST = {"epoch": 3, "optimizers": {"groups": [], "values": {}}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What was sent to the disk early: file, offset and size, in order. Pieces and large buffers are small here."""
    calls: list[tuple[int, int, int]] = []
    original = writeback._sync_file_range()
    assert original is not None

    def send(descriptor: int, offset: int, size: int, flags: int) -> int:
        calls.append((os.fstat(descriptor).st_ino, offset, size))
        return original(descriptor, offset, size, flags)

    monkeypatch.setattr(writeback, "_sync_file_range", lambda: send)
    monkeypatch.setattr(writeback, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(hashing, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(hashing, "_SMALL_BYTES", 8 * KIB)
    return calls


def write(store: CheckpointStore, step: int, buffers: list[bytes]) -> None:
    def fill(staging: Staging) -> None:
        with staging.file("state.pt") as file:
            for buffer in buffers:
                assert file.write(buffer) == len(buffer)
            assert file.tell() == sum(map(len, buffers))

    commit.write_checkpoint(store.path(step), 0, CommitInfo(step=step), 0, fill)


def test_every_piece_is_sent_once_and_in_order(store: CheckpointStore, sent: list[tuple[int, int, int]]) -> None:
    sizes = [0, 1, 100, PIECE, 5, 3 * PIECE + 7, 8 * KIB, PIECE - 1, 2 * PIECE]
    buffers = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    write(store, 1, buffers)
    content = b"".join(buffers)
    assert (store.path(1) / "state.pt").read_bytes() == content
    assert commit.read_commit(store.path(1)).files["state.pt"].sha256 == hashlib.sha256(content).hexdigest()
    inode, at = (store.path(1) / "state.pt").stat().st_ino, 0
    for file, offset, size in sent:
        assert (file, offset, size % PIECE) == (inode, at, 0)
        at += size
    assert at == len(content) // PIECE * PIECE


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("seed", range(4))
def test_buffers_of_any_size_are_hashed_in_the_order_in_which_they_are_written(
    store: CheckpointStore, seed: int
) -> None:
    draw = random.Random(seed)
    buffers = [
        draw.randbytes(draw.choice((3, 4 * KIB, 9 * KIB, PIECE, 5 * PIECE)) + draw.randrange(9)) for _ in range(60)
    ]
    write(store, 1, buffers)
    assert commit.verify(store.path(1)) == []
    assert (store.path(1) / "state.pt").read_bytes() == b"".join(buffers)


def test_a_buffer_may_change_once_it_is_written(store: CheckpointStore) -> None:
    buffer = bytearray(8 << 20)

    def fill(staging: Staging) -> None:
        with staging.file("state.pt") as file:
            for number in range(8):
                buffer[:] = bytes([number]) * len(buffer)
                file.write(buffer)

    commit.write_checkpoint(store.path(1), 0, CommitInfo(step=1), 0, fill)
    assert commit.verify(store.path(1)) == []


def test_where_the_call_is_refused_fsync_does_all_of_it(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []

    def refuse(*arguments: int) -> int:
        refused.append(arguments[1])
        return -1

    monkeypatch.setattr(writeback, "PIECE_BYTES", PIECE)
    for step, function in ((1, refuse), (2, None)):
        monkeypatch.setattr(writeback, "_sync_file_range", lambda function=function: function)
        write(store, step, [b"x" * PIECE] * 9)
    assert refused == [0], "asked again after a refusal"
    assert [commit.verify(store.path(step)) for step in (1, 2)] == [[], []]


def test_a_file_that_has_no_such_call_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    send, answers = writeback._sync_file_range(), []
    assert send is not None

    def noted(*arguments: int) -> int:
        answers.append(send(*arguments))
        return answers[-1]

    monkeypatch.setattr(writeback, "_sync_file_range", lambda: noted)
    reader, writer = os.pipe()
    try:
        started = Writeback(writer)
        for count in range(1, 4):
            started.start(count * writeback.PIECE_BYTES)
    finally:
        os.close(reader)
        os.close(writer)
    assert answers == [-1], "ESPIPE, and not asked again"


@pytest.mark.parametrize("missing", [AttributeError, OSError])
def test_a_system_without_the_call(monkeypatch: pytest.MonkeyPatch, missing: type[Exception]) -> None:
    def library(name: None) -> Any:
        raise missing

    writeback._sync_file_range.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", library)
    try:
        assert writeback._sync_file_range() is None
    finally:
        monkeypatch.undo()
        writeback._sync_file_range.cache_clear()


class FailingDigest:
    """Fails like a thread that cannot get memory, at a large buffer."""

    left = 2

    def update(self, view: memoryview) -> None:
        if view.nbytes >= hashing._SMALL_BYTES:
            FailingDigest.left -= 1
            if FailingDigest.left < 0:
                raise MemoryError("no memory to hash")

    def hexdigest(self) -> str:
        return "0" * 64


@pytest.mark.parametrize("layout", ["file", "sharded"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_the_thread_that_hashes_fails_the_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, layout: str, asynchronous: bool
) -> None:
    monkeypatch.setattr(FailingDigest, "left", 2)
    monkeypatch.setattr(hashing.hashlib, "sha256", FailingDigest)
    writer, tensors = (
        CheckpointWriter(store, asynchronous),
        {f"model/{number}": torch.ones(1 << 19) for number in range(4)},
    )
    if layout == "file":
        writer.save({"state_dict": tensors}, store.path(1), CommitInfo(step=1))
    else:
        writer.save_sharded(tensors, REST, store.path(1), SHARDED, None)
    writer.wait()
    with pytest.raises(MemoryError, match="no memory to hash"):
        writer.raise_if_failed()
    assert list(store.directory.iterdir()) == []
    assert [one.name for one in threading.enumerate() if one.name.startswith("checkpoint-hash")] == []


def test_an_error_that_the_caller_swallows_fails_the_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_FAULT", "file.write:1:ENOSPC")

    def fill(staging: Staging) -> None:
        with staging.file("state.pt") as file:
            try:
                file.write(b"lost")
            except OSError:
                pass

    with pytest.raises(SaveFailed, match="No space left"):
        commit.write_checkpoint(store.path(1), 0, CommitInfo(step=1), 0, fill)
    assert list(store.directory.iterdir()) == []


def test_only_shards_are_without_crc(store: CheckpointStore) -> None:
    writer, tensor = CheckpointWriter(store, asynchronous=False), torch.randn(1 << 18)
    writer.save_sharded({"model/a": tensor}, REST, store.path(1), SHARDED, None)
    writer.raise_if_failed()
    assert torch.equal(StoredCheckpoint(store.path(1)).whole("model/")["model/a"], tensor)
    assert torch.serialization.get_crc32_options(), "torch.save of a user computes no CRC any more"
    (chunk,) = shard_index.read(store.path(1))["model/a"].chunks
    content = (store.path(1) / "shards" / chunk.file).read_bytes()[chunk.begin : chunk.begin + chunk.length]
    with zipfile.ZipFile(io.BytesIO(content)) as shard:
        assert {entry.CRC for entry in shard.infolist()} == {0}
    with zipfile.ZipFile(store.path(1) / "state.pt") as archive:
        assert archive.testzip() is None, "programs that read ZIP archives refuse state.pt"


LIMITED = """
import resource, sys, torch
from pathlib import Path
from trainer.checkpoint import commit, hashing, shard_index, writeback
from trainer.checkpoint.commit import CommitInfo, SaveFailed
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
hashing.PIECE_BYTES = writeback.PIECE_BYTES = 1 << 20
tensors = {f"model/{number}": torch.full((1 << 19,), float(number)) for number in range(3)}
rest = {"optimizers": {"groups": [], "values": {}}}
def save(step, asynchronous, layout):
    writer = CheckpointWriter(store, asynchronous)
    if layout == "file":
        writer.save({"state_dict": tensors}, store.path(step), CommitInfo(step=step))
    else:
        writer.save_sharded(tensors, rest, store.path(step), CommitInfo(step=step, layout="sharded"), None)
    writer.wait()
    writer.raise_if_failed()
before = resource.getrlimit(resource.RLIMIT_FSIZE)
for layout in ("file", "sharded"):
    for asynchronous in (False, True):
        for limit in range(1 << 19, 6 << 20, 1 << 19):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                save(2, asynchronous, layout)
            except SaveFailed as error:
                assert "File too large" in str(error), error
            else:
                raise AssertionError(f"saved in {limit} bytes")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert list(store.directory.iterdir()) == [], (layout, asynchronous, limit)
        save(1, asynchronous, layout)
        assert commit.verify(store.path(1)) == []
        commit.remove(store.path(1))
print("all refused")
"""


def test_a_file_that_cannot_grow_at_any_of_its_buffers(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "checkpoints")], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (0, "all refused\n"), ran.stderr


SAVER = """
import sys, torch
from pathlib import Path
from trainer.checkpoint import hashing, writeback
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
store, attempt = CheckpointStore(Path(sys.argv[1])), int(sys.argv[2])
hashing.PIECE_BYTES = writeback.PIECE_BYTES = 1 << 20
writer = CheckpointWriter(store, attempt=attempt)
first = max((one.step for one in store.committed()), default=0)
for step in range(first + 1, first + 200):
    tensors = {f"model/{number}": torch.full((1 << 20,), float(step)) for number in range(3)}
    state = {"step": step, "optimizers": {"groups": [], "values": {}}}
    writer.save_sharded(tensors, state, store.path(step), CommitInfo(step=step, layout="sharded"), None)
    tensors["model/0"].zero_()
    writer.wait()
    writer.raise_if_failed()
    store.prune(keep_last=2)
    print(step, flush=True)
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_a_random_moment_leaves_every_announced_checkpoint(tmp_path: Path, seed: int) -> None:
    draw, newest = random.Random(seed), 0
    store = CheckpointStore(tmp_path / "checkpoints")
    for attempt in range(2):
        announced = killed_after(draw, [sys.executable, "-c", SAVER, str(store.directory), str(attempt)])
        assert announced
        found, skipped = store.newest_good()
        assert found is not None
        assert skipped == []
        assert found.step in (announced[-1], announced[-1] + 1)
        assert found.step > newest
        newest = found.step
        values = StoredCheckpoint(found.path).whole("model/")
        assert {float(one.min()) for one in values.values()} == {float(one.max()) for one in values.values()}
        assert float(values["model/0"][0]) == newest


def killed_after(draw: random.Random, command: list[str]) -> list[int]:
    """Kill a process some milliseconds after one of its first lines, and return the numbers that it has printed."""
    lines, delay_s = draw.randrange(1, 4), draw.random() * 0.1
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(lines)]
        time.sleep(delay_s)  # the moment of the kill, wherever in a save it is
        process.send_signal(signal.SIGKILL)
        printed += process.stdout.readlines()
    return [int(line) for line in printed if line.endswith("\n")]
