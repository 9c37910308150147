"""Token shards behind a URL: the same windows in the same order, whatever the store does; a bounded cache."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.data.remote_shards import LENGTH, Faulty, upload, write_shards
from trainer.config.batch import BatchPlan
from trainer.core.errors import EnvironmentFault, UserError
from trainer.data import remote, shard_cache
from trainer.data.loader import resumable
from trainer.data.locations import require_remote
from trainer.data.mixture import Mixture
from trainer.data.remote import RemoteUnavailable
from trainer.data.shard_cache import ShardCache, default_folder
from trainer.data.shard_index import IndexedFile
from trainer.data.shard_order import ShardOrder
from trainer.data.token_shards import TokenShards

SHARD_BYTES = 82


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    monkeypatch.setattr(shard_cache, "_RETRY_S", 0.01)


def batches(root: str, cache: Path | None = None, rank: int = 0, ranks: int = 1, **options: Any) -> list[list[int]]:
    """The first token of each window of an epoch."""
    data = TokenShards(root, 4, LENGTH, shuffle_shards=2, cache=str(cache) if cache else None, **options)
    data.setup()
    try:
        loader = resumable(data.train_dataloader(), BatchPlan.of(4, None, ranks), rank, 7)
        return [inputs[:, 0].tolist() for inputs, targets in loader]
    finally:
        wait_for_prefetching(data)


def wait_for_prefetching(data: TokenShards) -> None:
    prefetcher = getattr(data.shards, "_prefetcher", None)
    if prefetcher is not None:
        prefetcher.want([])
        thread = prefetcher._thread
        if thread is not None:
            thread.join(20)
            assert not thread.is_alive()


def test_the_order_keeps_shards_together_and_reads_each_window_once(tmp_path: Path) -> None:
    windows = numpy.array([10, 0, 7, 3, 1, 9, 10])
    order = ShardOrder(windows, 2, 5)
    begins = numpy.cumsum(windows) - windows
    for epoch in (0, 3):
        ids = order(epoch, torch.arange(40)).tolist()
        assert sorted(ids) == list(range(40))
        assert ids == [int(order(epoch, torch.tensor([place]))) for place in range(40)]
        owners = (numpy.searchsorted(begins + windows, ids, side="right")).tolist()
        groups = [tuple(sorted(set(order.needed(epoch, owner)[0]))) for owner in owners]
        assert len([key for key, _ in itertools.groupby(groups)]) == len(set(groups)) <= 4
        assert ids != sorted(ids)
    assert order(0, torch.arange(40)).tolist() != order(1, torch.arange(40)).tolist()
    last = order(0, torch.tensor([39]))
    shard = int(numpy.searchsorted(begins + windows, int(last), side="right"))
    assert order.needed(0, shard)[1] == order.needed(1, order._epoch(1).shards[0])[0]


def test_a_remote_folder_is_read_as_a_local_one_at_any_world_size(tmp_path: Path) -> None:
    local = write_shards(tmp_path / "shards")
    expected = batches(str(local))
    url = upload(local)
    assert batches(url, tmp_path / "cache") == expected
    assert len(Faulty.reads) == len(set(Faulty.reads)), "a file was downloaded twice"
    shares = [batches(url, tmp_path / "cache", rank, 2) for rank in range(2)]
    assert [one + other for one, other in zip(*shares, strict=True)] == expected
    assert len(Faulty.reads) == len(set(Faulty.reads)) + 2, "only meta.json is read again"


def flaky(times: int, change: Callable[[bytes], bytes]) -> Callable[[str, bytes], bytes]:
    """The first reads of each shard fail."""
    seen: dict[str, int] = {}

    def fault(name: str, content: bytes) -> bytes:
        seen[name] = seen.get(name, 0) + 1
        return change(content) if seen[name] <= times else content

    return fault


def raising(error: Exception) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        raise error

    return change


@pytest.mark.parametrize(
    "change",
    [lambda content: content[:-1], lambda content: b"", raising(OSError("SlowDown")), raising(TimeoutError())],
    ids=["truncated", "empty", "throttled", "slow"],
)
def test_faults_that_pass_are_retried(tmp_path: Path, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    local = write_shards(tmp_path / "shards")
    expected, url = batches(str(local)), upload(local)
    fault = flaky(2, change)
    Faulty.fault = staticmethod(lambda name, content: fault(name, content) if "train" in name else content)  # type: ignore[assignment]
    assert batches(url, tmp_path / "cache") == expected
    assert "try 2 of 6" in caplog.text


def test_faults_that_last_are_reported(tmp_path: Path) -> None:
    url = upload(write_shards(tmp_path / "shards"))
    Faulty.fault = staticmethod(lambda name, content: content[:5] if "train" in name else content)  # type: ignore[assignment]
    with pytest.raises(RemoteUnavailable, match=r"faulty://bucket/train-\d+.bin cannot be read, after 6 tries: OSErr"):
        batches(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*train*")), "a partial file is left"


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    url = upload(write_shards(tmp_path / "shards"))
    Faulty.fault = staticmethod(lambda name, content: content[::-1] if "train" in name else content)  # type: ignore[assignment]
    with pytest.raises(UserError, match="is not what its index describes: its sha256"):
        batches(url, tmp_path / "cache")


@pytest.mark.parametrize(
    ("error", "message"),
    [(FileNotFoundError("x"), "does not exist\n.*trainer data index"), (PermissionError("x"), "must not be read")],
)
def test_what_another_try_would_get_again_is_not_retried(tmp_path: Path, error: Exception, message: str) -> None:
    url = upload(write_shards(tmp_path / "shards"))
    Faulty.fault = staticmethod(lambda name, content: raising(error)(content))  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        batches(url, tmp_path / "cache")
    assert Faulty.reads == ["meta.json"]


def test_what_cannot_be_read_is_said_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no protocol is called s4"):
        require_remote("s4://bucket")
    with pytest.raises(UserError, match="holds a password"):
        require_remote("https://me:secret@host/shards")
    with pytest.raises(EnvironmentFault, match="needs adlfs"):
        require_remote("abfs://bucket/shards")
    url = upload(write_shards(tmp_path / "shards", indexed=False))
    with pytest.raises(UserError, match="describes no index"):
        batches(url, tmp_path / "cache")
    url = upload(write_shards(tmp_path / "more"))
    with pytest.raises(UserError, match=r"use a larger data\.cache_gb"):
        batches(url, tmp_path / "cache", cache_gb=3e-7)


def files_of(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.glob("*/*")}


def test_the_cache_stays_within_its_limit_and_keeps_what_is_read(tmp_path: Path) -> None:
    local = write_shards(tmp_path / "shards", shards=12)
    expected, url = batches(str(local)), upload(local)
    index = (local / "index.json").stat().st_size
    limit = index + 5 * SHARD_BYTES
    most = 0
    cache = tmp_path / "cache"
    original = ShardCache._reserve

    def observed(self: ShardCache, *arguments: Any) -> bool:
        nonlocal most
        done = original(self, *arguments)
        most = max(most, sum(files_of(cache).values()))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardCache, "_reserve", observed)
        assert batches(url, cache, cache_gb=limit / 1e9) == expected
    assert 4 * SHARD_BYTES < most <= limit


def in_memory(content: bytes) -> Any:
    def fetch(name: str, expected: IndexedFile, descriptor: int) -> None:
        os.pwrite(descriptor, content, 0)

    return fetch


def test_a_file_in_use_is_not_removed_and_one_needed_now_exceeds_the_limit(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", "x", 250, in_memory(bytes(100)))
    expected = IndexedFile(100, "0" * 64)
    held = [cache.open(name, expected) for name in "ab"]
    assert not cache.prefetch("c", expected)
    assert files_of(cache.root) == {"a": 100, "b": 100}
    with cache.open("c", expected):
        assert set(files_of(cache.root)) == {"a", "b", "c"}
    held[0].close()
    assert cache.prefetch("d", expected)
    assert set(files_of(cache.root)) == {"b", "d"}, "those opened longest ago are removed, unless they are being read"
    held[1].close()


_KILLED = """
import os, sys, time
from pathlib import Path
from trainer.data.shard_cache import ShardCache, default_folder
from trainer.data.shard_index import IndexedFile

def fetch(name, expected, descriptor):
    os.pwrite(descriptor, b"half", 0)
    print("downloading", flush=True)
    time.sleep(60)

ShardCache(Path(sys.argv[1]), "x", 250, fetch).open("a", IndexedFile(100, "0" * 64))
"""


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_file(tmp_path: Path) -> None:
    """Others wait while it lives, and download the file themselves when it is dead."""
    expected = IndexedFile(100, "0" * 64)
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "downloading\n"
        cache = ShardCache(tmp_path, "x", 250, in_memory(bytes(range(100))))
        assert not cache.prefetch("a", expected), "another process downloads it"
        assert files_of(tmp_path) == {".a.part": 100}, "its place is reserved"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with cache.open("a", expected) as file:
        assert file.read() == bytes(range(100))
    assert files_of(tmp_path) == {"a": 100}


def test_many_processes_share_each_download(tmp_path: Path) -> None:
    """Threads stand for processes: locks belong to open files."""
    fetched: list[str] = []

    def fetch(name: str, expected: IndexedFile, descriptor: int) -> None:
        fetched.append(name)
        os.pwrite(descriptor, name.encode() * 100, 0)

    def read(turn: int) -> None:
        cache = ShardCache(tmp_path, "x", 10_000, fetch)
        for number in range(20):
            name = chr(97 + (number + turn) % 20)
            with cache.open(name, IndexedFile(100, "")) as file:
                assert file.read() == name.encode() * 100

    threads = [threading.Thread(target=read, args=(turn,)) for turn in (0, 0, 5, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fetched) == [chr(97 + number) for number in range(20)]


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server that knows no ranges, as Python's."""
    root = write_shards(tmp_path / "web" / "shards")
    with HTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(root.parent))) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}/shards"
        web.shutdown()
        thread.join()


def test_a_web_server_without_ranges(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RANGE_BYTES", 50)
    assert batches(server, tmp_path / "cache") == batches(str(tmp_path / "web" / "shards"))
    with pytest.raises(UserError, match=r"elsewhere/meta\.json does not exist"):
        batches(f"{server}/elsewhere", tmp_path / "cache")


def test_a_cache_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = ShardCache(tmp_path, "x", 250, in_memory(bytes(100)))
    with pytest.raises(EnvironmentFault, match="the file system has no locks"):
        cache.open("a", IndexedFile(100, ""))


def test_a_mixture_reads_a_source_in_its_own_order(tmp_path: Path) -> None:
    local = write_shards(tmp_path / "shards")
    source = TokenShards(str(local), 4, LENGTH, shuffle_shards=2)
    data = Mixture({"shards": source}, batch_size=4)
    data.setup()
    loader = resumable(data.train_dataloader(), BatchPlan.of(4, None, 1), 0, 7)
    firsts = [token for inputs, _ in loader for token in (inputs[:, 0] // 1000).tolist()]
    assert sorted(firsts) == sorted(number for number in range(6) for _ in range(10))


def test_local_shards_are_checked_against_their_index(tmp_path: Path) -> None:
    local = write_shards(tmp_path / "shards")
    before = batches(str(write_shards(tmp_path / "old", indexed=False)))
    assert batches(str(local)) == before
    (local / "train-00003.bin").write_bytes(bytes(20))
    with pytest.raises(UserError, match=r"train-00003.bin cannot be read: 20 bytes where 82 were expected"):
        batches(str(local))
    (local / "index.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match=r"is not the index that meta\.json describes"):
        batches(str(local))


def test_nobody_else_can_replace_the_cache_that_is_used_by_default() -> None:
    """In the temporary directory itself, whose sticky bit protects what is directly there only."""
    assert default_folder().parent == Path(tempfile.gettempdir())
    assert str(os.getuid()) in default_folder().name
