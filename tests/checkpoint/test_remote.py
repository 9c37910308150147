"""Checkpoints in an object store: whole or invisible, whatever fails or dies at which request."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoint.object_server import ObjectServer, by_chance, running
from trainer.checkpoint import commit, object_store, remote_record
from trainer.checkpoint import remote as remote_module
from trainer.checkpoint.commit import CommitInfo, Staging, write_checkpoint
from trainer.checkpoint.object_store import Exists, ObjectStore, probe
from trainer.checkpoint.remote import RemoteStore
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.uploads import Uploads
from trainer.config.checkpoint_url import missing_package, problem_of
from trainer.core.errors import EnvironmentFault, TrainerError, UserError

URL = "s3://bucket/runs/one"
SHARD = "shards/__1_0.distcp"


@pytest.fixture(scope="module")
def one_server() -> Iterator[ObjectServer]:
    with running() as server:
        yield server
        objects.cache_clear()


@pytest.fixture
def server(one_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    monkeypatch.setattr(object_store, "_FIRST_PAUSE_S", 0.001)
    one_server.reset()
    return one_server


def saved(folder: Path, step: int, content: bytes, value: float | None = None, attempt: int = 0) -> Path:
    """A checkpoint of two ranks in the run directory `folder`."""
    store = CheckpointStore(folder, "one")

    def write(staging: Staging) -> None:
        for name in ("state.pt", SHARD):
            with staging.file(name) as file:
                file.write(name.encode() + content)

    info = CommitInfo(step=step, run="one", monitor="val/loss", monitor_value=value, monitor_mode="min", world_size=2)
    assert write_checkpoint(store.path(step), attempt, info, 0, write)
    return store.path(step)


@cache
def objects(retry_for_s: float) -> ObjectStore:
    """A client is expensive to make."""
    return ObjectStore(URL, retry_for_s)


def opened(folder: Path, retry_for_s: float = 60.0) -> RemoteStore:
    return RemoteStore(objects(retry_for_s), CheckpointStore(folder, "one"))


def content_of(path: Path) -> set[bytes]:
    assert commit.verify(path) == []
    return {(path / name).read_bytes().removeprefix(name.encode()) for name in ("state.pt", SHARD)}


def test_what_is_uploaded_is_fetched_as_it_was(server: ObjectServer, tmp_path: Path) -> None:
    path = saved(tmp_path / "a", 10, b"abc", value=0.5)
    assert opened(tmp_path / "a").upload(path)
    there = opened(tmp_path / "b")
    (found,) = there.committed()
    assert (found.step, found.monitor_value, found.run) == (10, 0.5, "one")
    assert there.fetch("step-00000010") == tmp_path / "b" / "step-00000010"
    assert content_of(tmp_path / "b" / "step-00000010") == {b"abc"}
    assert (found.path / "COMMIT").read_bytes() == (path / "COMMIT").read_bytes()
    there.record(there.committed())
    ((recorded, url),) = remote_record.read(tmp_path / "b").values()
    assert (recorded, url) == (found, f"{URL}/step-00000010")


def test_a_crash_at_any_request_leaves_whole_checkpoints_and_the_next_attempt_replaces_the_rest(
    server: ObjectServer, tmp_path: Path
) -> None:
    older = saved(tmp_path / "a", 10, b"older")
    path, again = saved(tmp_path / "a", 20, b"first"), saved(tmp_path / "b", 20, b"again", attempt=1)

    def attempt(after: int) -> tuple[int, bool]:
        """Upload step 20 and delete step 10; the request `after` is done, and nothing after it."""
        server.reset()
        assert opened(tmp_path / "a").upload(older)
        server.requests.clear()
        server.fault = lambda number, *_: None if number < after else "lost" if number == after else "down"
        crashed = opened(tmp_path / "a", retry_for_s=0.0)
        try:
            crashed.upload(path)
            crashed.prune(keep_last=1)
        except (TrainerError, OSError):
            return after, False
        return len(server.requests), True

    total, _ = attempt(10**9)
    assert total >= 8
    seen = set()
    for request in range(1, total + 1):
        attempt(request)
        server.fault = lambda *_: None
        left = opened(tmp_path / "c")
        steps = [one.step for one in left.committed()]
        assert steps in ([10], [10, 20], [20]), f"request {request}: {steps}"
        assert all(left.verify(one.path.name) == [] for one in left.committed()), f"request {request}"
        seen.add(tuple(steps))
        following = opened(tmp_path / "b")
        following.clean_leftovers()
        assert following.upload(again)
        following.prune(keep_last=1)
        fetched = opened(tmp_path / f"fetched-{request}")
        assert content_of(fetched.fetch("step-00000020")) == {b"again"}, f"request {request}: a mixed checkpoint"
        assert len(server.keys()) == 3, f"request {request}: {server.keys()}"  # COMMIT and two files
    assert seen == {(10,), (10, 20), (20,)}


@pytest.mark.parametrize("seed", [1, 2])
def test_lost_replies_throttling_and_cut_connections_only_take_time(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(object_store, "PIECE_BYTES", 5 << 20)  # the smallest part that S3 takes
    monkeypatch.setattr(object_store, "_LONGEST_PAUSE_S", 0.01)
    content = os.urandom(11 << 20)
    path = saved(tmp_path / "a", 10, content)
    server.fault = by_chance(seed, 0.3, ("lost", "slow_down", "cut"))
    assert opened(tmp_path / "a").upload(path)
    assert [one.step for one in opened(tmp_path / "b").committed()] == [10]
    assert content_of(opened(tmp_path / "b").fetch("step-00000010")) == {content}
    assert ("POST", f"/bucket/runs/one/{_data(path)}/state.pt") in server.requests, "it was not sent in parts"
    server.fault = lambda *_: None
    opened(tmp_path / "a").clean_leftovers()
    assert len(server.keys()) == 3


def _data(path: Path) -> str:
    return f"{path.name}/{remote_module._digest_of((path / 'COMMIT').read_bytes())}"


def test_of_two_attempts_the_newer_stays_and_a_superseded_one_commits_nothing(
    server: ObjectServer, tmp_path: Path
) -> None:
    older, newer = saved(tmp_path / "a", 10, b"older"), saved(tmp_path / "b", 10, b"newer")
    assert opened(tmp_path / "b").upload(newer)
    assert not opened(tmp_path / "a").upload(older)
    assert content_of(opened(tmp_path / "c").fetch("step-00000010")) == {b"newer"}
    superseded = opened(tmp_path / "a")

    def refuse() -> None:
        raise EnvironmentFault("attempt 1 has begun", "")

    superseded.may_write = refuse
    with pytest.raises(EnvironmentFault, match="has begun"):
        superseded.upload(saved(tmp_path / "a", 30, b"orphan"))
    assert [one.step for one in superseded.committed()] == [10]


def test_each_rank_sends_its_files_and_the_first_waits_for_all(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a", 10, b"abc")
    first = threading.Thread(target=lambda: opened(tmp_path / "a").upload(path, 0, 2))
    first.start()
    opened(tmp_path / "a").upload(path, 1, 2)
    first.join(30)
    assert [one.step for one in opened(tmp_path / "b").committed()] == [10]
    puts = [path for method, path in server.requests if method == "PUT"]
    assert len(puts) == len(set(puts)) == 3
    monkeypatch.setattr(remote_module, "STALLED_AFTER_S", 0.05)
    with pytest.raises(EnvironmentFault, match=r"1 files of .* such as shards/__1_0\.distcp"):
        opened(tmp_path / "a").upload(saved(tmp_path / "a", 20, b"abc"), 0, 2)


def test_uploads_run_in_order_and_retention_deletes_there(server: ObjectServer, tmp_path: Path) -> None:
    uploaded: list[str] = []
    uploads = Uploads(opened(tmp_path / "a"), on_uploaded=lambda path: uploaded.append(path.name))
    paths = [saved(tmp_path / "a", step, b"abc", value) for step, value in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.7))]
    for path in paths:
        uploads.submit(path)
    waiting = uploads.names()
    assert waiting == [path.name for path in paths][-len(waiting) :]
    CheckpointStore(tmp_path / "a", "one").prune(keep_last=1, busy=[path.name for path in paths])
    uploads.close()
    assert (uploads.names(), uploaded, uploads.take_failure()) == ([], [path.name for path in paths], None)
    assert [one.step for one in uploads.remote.prune(keep_last=1, keep_best=1)] == [1, 4]
    assert [one.step for one in opened(tmp_path / "b").committed()] == [1, 4]
    assert len(server.keys()) == 6
    server.fault = lambda *_: "down"
    uploads.remote = opened(tmp_path / "a", retry_for_s=0.0)
    uploads.submit(saved(tmp_path / "a", 5, b"abc"))
    uploads.close()
    assert isinstance(uploads.take_failure(), EnvironmentFault)


def test_a_damaged_object_and_a_foreign_commit_are_refused(server: ObjectServer, tmp_path: Path) -> None:
    """blocked by: checksums, and COMMIT is checked as that of a run directory"""
    path = saved(tmp_path / "a", 10, b"abc")
    store = opened(tmp_path / "a")
    store.upload(path)
    key = f"{_data(path)}/state.pt"
    store.objects.delete([key])
    store.objects.create(key, b"state.ptabX")
    assert store.verify("step-00000010") == ["state.pt: checksum differs"]
    with pytest.raises(UserError, match=r"is damaged: state\.pt: checksum differs"):
        opened(tmp_path / "b").fetch("step-00000010")
    assert list((tmp_path / "b").iterdir()) == []
    raw = (path / "COMMIT").read_bytes()
    for name, content in (("step-00000020", raw), ("step-00000030", b"{"), ("other", raw)):
        store.objects.create(f"{name}/COMMIT", content)
    assert [one.step for one in opened(tmp_path / "b").committed()] == [10]
    with pytest.raises(Exists):
        store.objects.create("other/COMMIT", b"{}")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://key:secret@bucket/x", "a user, a password or parameters"),
        ("s3://bucket/x?token=1", "a user, a password or parameters"),
        ("/scratch/x", "object stores with a URL of s3://"),
        ("http://bucket/x", "object stores with a URL of s3://"),
        ("s3://", "names no bucket"),
        ("s3://bucket/../other", "names no bucket"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_a_request(url: str, words: str) -> None:
    problem = problem_of(url)
    assert problem is not None
    assert words in problem.message
    assert "s3://BUCKET/PREFIX" in problem.fix
    assert "secret" not in problem.message


def test_what_is_missing_is_named_with_the_line_to_write(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(URL)
    assert server.keys() == []
    with pytest.raises(EnvironmentFault, match="there is no bucket elsewhere") as caught:
        probe("s3://elsewhere/x")
    assert caught.value.fix == "create it: aws s3 mb s3://elsewhere"
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        with pytest.raises(EnvironmentFault, match="Unable to locate credentials") as caught:
            probe(URL)
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(caught.value.fix)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        problem = missing_package(URL)
        assert problem is not None
        assert (problem.message, problem.fix) == (
            f"checkpoint.dir={URL}: s3fs is not installed",
            "pip install 's3fs>=2025.3'",
        )
