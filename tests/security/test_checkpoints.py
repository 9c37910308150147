"""A checkpoint is data: whatever somebody puts into one, nothing in it is executed, followed, waited for or deleted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from trainer.checkpoint import commit, data_file, shard_index
from trainer.checkpoint.commit import CommitInfo, Staging
from trainer.checkpoint.foreign import read_pickled
from trainer.checkpoint.hashing import sha256
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO, load_state
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.checkpoint.tiers import newest_good, remove_local
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.core.errors import TrainerError
from trainer.runtime import failure
from trainer.train.fine_tuning import _read

WITHIN_S = 120.0
"""A FIFO that is waited for, and a device that is read to its end, take longer."""


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path, call: Callable[..., Any] = os.system) -> None:
        self.target, self.call = target, call

    def __reduce__(self) -> tuple[Any, ...]:
        command = f"touch {self.target}"
        return self.call, (command if self.call is os.system else command.split(),)


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """The file that exists once a payload was executed."""
    return tmp_path / "executed"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, step: int = 1, sharded: bool = False) -> Path:
    writer = CheckpointWriter(store, asynchronous=False)
    weight = torch.arange(6.0).view(2, 3) * step
    if sharded:
        state = {"epoch": 0, "optimizers": {"groups": [], "values": {}}}
        info = CommitInfo(step=step, layout="sharded")
        writer.save_sharded({"model/weight": weight}, state, store.path(step), info, None)
    else:
        writer.save({"state_dict": {"weight": weight}, "optimizer_states": []}, store.path(step), CommitInfo(step=step))
    writer.raise_if_failed()
    return store.path(step)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change COMMIT, and seal it again, as an attacker can."""
    content = json.loads((path / "COMMIT").read_text())
    del content["digest"]
    change(content)
    content["digest"] = commit._digest(content)
    (path / "COMMIT").write_text(json.dumps(content))


def seal(path: Path) -> None:
    """Make COMMIT list the files that are there, with their sizes and checksums."""
    listed = {
        one.relative_to(path).as_posix(): {"bytes": one.stat().st_size, "sha256": sha256(one)}
        for one in path.rglob("*")
        if one.is_file() and one.name != "COMMIT"
    }
    rewrite(path, lambda content: content.update(files=listed))


def within_time(call: Callable[[], object]) -> object:
    """Return the exception or the result of a call that must not wait."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WITHIN_S)
    assert outcome, "it still waits"
    return outcome[0]


def as_released_before(path: Path) -> None:
    """Write the index of a sharded checkpoint as torch.distributed.checkpoint does, and older releases did."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    shutil.rmtree(path / "shards")
    dcp_save({"model/weight": torch.arange(6.0).view(2, 3)}, storage_writer=FileSystemWriter(path / "shards"))
    seal(path)


@pytest.mark.honest
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_index_is_json_and_the_pickle_of_older_releases_is_still_read(store: CheckpointStore) -> None:
    path = save(store, sharded=True)
    assert json.loads((path / "shards" / "index.json").read_text())["files"] == ["__0_0.distcp"]
    assert not (path / "shards" / ".metadata").exists()
    expected = StoredCheckpoint(path).whole()["model/weight"]
    as_released_before(path)
    assert (path / "shards" / ".metadata").read_bytes()[:1] == b"\x80", "not a pickle"
    assert torch.equal(StoredCheckpoint(path).whole()["model/weight"], expected)


def _plain_payload(touched: Path) -> bytes:
    return pickle.dumps(Payload(touched))


def _payload_in_an_index(touched: Path) -> bytes:
    from torch.distributed.checkpoint.metadata import Metadata

    return pickle.dumps(Metadata(state_dict_metadata={}, planner_data=Payload(touched), storage_data={}))


def _bytes_entry(touched: Path) -> bytes:
    """An entry of bytes, which torch loads with weights_only=False."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    places = {MetadataIndex("model/weight"): _StorageInfo("__0_0.distcp", 0, 100)}
    return pickle.dumps(Metadata(state_dict_metadata={"model/weight": BytesStorageMetadata()}, storage_data=places))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("attack", [_plain_payload, _payload_in_an_index, _bytes_entry])
def test_a_pickle_as_index_is_never_executed(
    store: CheckpointStore, touched: Path, attack: Callable[[Path], bytes]
) -> None:
    """blocked by: a closed list of types for the index of release 0.1; the present one is JSON"""
    path = save(store, sharded=True)
    as_released_before(path)
    (path / "shards" / ".metadata").write_bytes(attack(touched))
    torch.save(Payload(touched), path / "shards" / "__0_0.distcp")
    seal(path)
    for read in (lambda: StoredCheckpoint(path).whole(), lambda: _read(path)["weight"].read()):
        with pytest.raises(BadCheckpoint, match="not a part of an index"):
            read()
    assert not touched.exists()


@pytest.mark.parametrize("where", ["state.pt", "shards/__0_0.distcp"])
def test_a_pickle_in_state_or_shard_is_never_executed(store: CheckpointStore, touched: Path, where: str) -> None:
    """blocked by: torch's closed list of types (weights_only)"""
    path = save(store, sharded=where != "state.pt")
    length = (path / where).stat().st_size
    with open(path / where, "wb") as file:
        torch.save({"state_dict": Payload(touched)}, file)
    if where != "state.pt":
        index = json.loads((path / "shards" / "index.json").read_text())
        index["tensors"]["model/weight"]["chunks"][0][4] = (path / where).stat().st_size
        (path / "shards" / "index.json").write_text(json.dumps(index))
        assert length
    seal(path)
    with pytest.raises(BadCheckpoint) as caught:
        StoredCheckpoint(path).whole()
    assert not touched.exists()
    assert "system" in str(caught.value)
    assert "weights_only" not in str(caught.value), "torch's advice executes the file"


def test_weights_only_cannot_be_turned_off(tmp_path: Path, touched: Path, store: CheckpointStore) -> None:
    """blocked by: the argument is ignored"""
    torch.save({"state_dict": Payload(touched)}, tmp_path / "foreign.ckpt")
    plugin = RunCheckpointIO(CheckpointWriter(store))
    with pytest.raises(BadCheckpoint):
        plugin.load_checkpoint(tmp_path / "foreign.ckpt", weights_only=False)
    assert not touched.exists()


@pytest.mark.parametrize("name", ["model.ckpt", "mp_rank_00_model_states.pt", "pytorch_model.bin"])
def test_init_from_reads_the_tensors_and_no_object(tmp_path: Path, touched: Path, name: str) -> None:
    """Lightning's and DeepSpeed's files hold objects beside the weights.

    blocked by: an empty placeholder takes the place of each object
    """
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": Payload(touched, subprocess.call)}, tmp_path / name
    )
    assert _read(tmp_path / name)["a"].read().tolist() == [1, 1]
    assert not touched.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut off", b"\x80\x04N.", b"cos\nsystem\n(S'true'\ntR.", b"no pickle at all" * 100]
)
def test_a_foreign_file_that_is_none_is_one_error(tmp_path: Path, content: bytes) -> None:
    """blocked by: every error of the readers names the file"""
    (tmp_path / "weights.ckpt").write_bytes(content)
    (tmp_path / "weights.safetensors").write_bytes(content)
    for name in ("weights.ckpt", "weights.safetensors"):
        with pytest.raises(TrainerError, match=r"finetune\.init_from") as caught:
            _read(tmp_path / name)
        assert "weights_only" not in str(caught.value)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _folder(path: Path) -> None:
    path.mkdir()


SPECIAL = [_fifo, _device, _link, _folder]


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["state.pt", "COMMIT", "shards/index.json", "shards"])
def test_what_is_not_a_regular_file_is_refused_at_once(
    store: CheckpointStore, make: Callable[[Path], None], name: str
) -> None:
    """blocked by: files are opened without following links or waiting, and must be regular"""
    path = save(store, sharded=True)
    if (path / name).is_dir():
        shutil.rmtree(path / name)
    else:
        (path / name).unlink()
    if name == "shards" and make is _folder:
        (path / name).symlink_to(path.parent)
    else:
        make(path / name)
    assert within_time(lambda: commit.verify(path)) != []
    outcome = within_time(lambda: StoredCheckpoint(path))
    assert isinstance(outcome, BadCheckpoint), outcome
    assert isinstance(within_time(lambda: _read(path)), BadCheckpoint)
    assert store.committed() == []
    newest, skipped = store.newest_good()
    assert newest is None
    assert len(skipped) == 1


def test_a_fifo_or_device_as_init_from_is_refused(tmp_path: Path) -> None:
    """blocked by: files are opened without waiting, and must be regular"""
    os.mkfifo(tmp_path / "weights.ckpt")
    os.mkfifo(tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.ckpt", tmp_path / "weights.safetensors", Path("/dev/zero")):
        outcome = within_time(lambda path=path: _read(path))  # type: ignore[misc]
        assert isinstance(outcome, BadCheckpoint), outcome


@pytest.mark.parametrize(
    "name", ["../outside.pt", "/etc/passwd", "a/../../x", "", ".", "..", "a//b", "a/b/c", "a\nb", "COMMIT", "x\0y"]
)
def test_commit_lists_plain_names_only(store: CheckpointStore, name: str) -> None:
    """blocked by: names in COMMIT match one pattern"""
    path = save(store)
    (path.parent / "outside.pt").write_bytes(b"x")

    def add(content: dict[str, Any]) -> None:
        content["files"][name] = {"bytes": 1, "sha256": "0" * 64}

    rewrite(path, add)
    with pytest.raises(BadCheckpoint):
        commit.read_commit(path)
    assert len(commit.verify(path)) == 1
    assert isinstance(within_time(lambda: load_state(path)), BadCheckpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 2**80},
        {"epoch": -5},
        {"world_size": 0},
        {"files": {"state.pt": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"state.pt": {"bytes": 1, "sha256": "../.."}}},
    ],
)
def test_commit_holds_possible_numbers(store: CheckpointStore, change: dict[str, Any]) -> None:
    """blocked by: numbers in COMMIT have a range"""
    path = save(store)
    rewrite(path, lambda content: content.update(change))
    with pytest.raises((BadCheckpoint, ValueError)):  # ValueError: a number of too many digits is no record
        commit.read_commit(path)
    assert store.newest_good()[0] is None


@pytest.mark.parametrize("text", ["[" * 200_000, '{"step": NaN}', "null", "9" * 10_000, "\x00", "{}"])
def test_a_commit_that_is_no_record_is_a_problem_and_no_traceback(store: CheckpointStore, text: str) -> None:
    """blocked by: records are validated when they are read"""
    path = save(store)
    (path / "COMMIT").write_text(text)
    assert len(commit.verify(path)) == 1
    assert store.committed() == []


def test_an_unlisted_state_is_not_opened(store: CheckpointStore) -> None:
    """blocked by: only what COMMIT lists is opened"""
    path = save(store)
    (path / "state.pt").unlink()
    os.mkfifo(path / "state.pt")
    rewrite(path, lambda content: content.update(files={}))
    assert isinstance(within_time(lambda: load_state(path)), BadCheckpoint)


def _chunk(change: Callable[[list[Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda index: change(index["tensors"]["model/weight"]["chunks"][0])


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "file outside": lambda index: index.update(files=["../state.pt"]),
    "absolute file": lambda index: index.update(files=["/etc/passwd"]),
    "unlisted file": lambda index: index.update(files=["__1_0.distcp"]),
    "no such number": _chunk(lambda chunk: chunk.__setitem__(2, 7)),
    "negative number": _chunk(lambda chunk: chunk.__setitem__(2, -1)),
    "begins before": _chunk(lambda chunk: chunk.__setitem__(3, -1)),
    "ends after": _chunk(lambda chunk: chunk.__setitem__(4, 10**9)),
    "huge tensor": lambda index: index["tensors"]["model/weight"].update(shape=[10**9, 10**9]),
    "huge chunk": lambda index: index["tensors"]["model/weight"].update(
        shape=[10**9, 3], chunks=[[[0, 0], [10**9, 3], 0, 0, 10]]
    ),
    "chunk outside": _chunk(lambda chunk: chunk.__setitem__(0, [1, 0])),
    "dtype": lambda index: index["tensors"]["model/weight"].update(dtype="load"),
    "version": lambda index: index.update(version=99),
    "shape": lambda index: index["tensors"]["model/weight"].update(shape=[True, 3]),
    "tensors": lambda index: index.update(tensors=[]),
    "more than the files": lambda index: index.update(
        tensors={f"model/{number}": index["tensors"]["model/weight"] for number in range(9)}
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused_before_a_shard_is_opened(store: CheckpointStore, lie: str) -> None:
    """blocked by: places, shapes and sizes of the index are compared with the files first"""
    path = save(store, sharded=True)
    file = path / "shards" / "index.json"
    index = json.loads(file.read_text())
    LIES[lie](index)
    file.write_text(json.dumps(index))
    seal(path)
    with pytest.raises(BadCheckpoint, match="malformed"):
        shard_index.read(path)


def test_a_compressed_file_is_refused_before_it_is_unpacked(store: CheckpointStore, tmp_path: Path) -> None:
    """blocked by: torch writes no compressed files, so none is read"""
    bomb = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1 << 20)}}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(BadCheckpoint, match="compressed"):
        read_pickled(bomb)
    assert data_file.load(tmp_path / "plain.ckpt")["state_dict"]["a"].shape == (1 << 20,)


def test_no_restart_retries_a_malformed_checkpoint(tmp_path: Path) -> None:
    """blocked by: an error of its own that is final"""
    attempt: Any = SimpleNamespace(
        heartbeat=SimpleNamespace(step=5),
        first_step=0,
        directory=SimpleNamespace(code_dir=tmp_path, checkpoints_dir=tmp_path),
        rank=SimpleNamespace(rank=0),
    )
    assert failure._failure_of(BadCheckpoint("it holds code"), attempt).is_final


def test_retention_deletes_nothing_of_another_run(tmp_path: Path) -> None:
    """`checkpoint.local_dir` and the name of the run may name any folder, such as one of the home directory.

    blocked by: only checkpoints whose COMMIT or name carries the id of the run are deleted
    """
    documents = tmp_path / "home" / "documents"
    (documents / "step-00000003").mkdir(parents=True)
    (documents / "letters.txt").write_text("mine")
    (documents / "step-00000003" / "notes.txt").write_text("mine")
    (documents / ".staging-attempt-00-step-00000009").mkdir()
    (documents / ".deleting-everything").mkdir()
    other = CheckpointStore(documents, "otherrun")
    for step in (1, 2, 4, 5):
        _save_of(other, step)
    before = sorted(str(path) for path in documents.rglob("*"))

    own = CheckpointStore(documents, "thisrun2", strict=True)
    shared = CheckpointStore(tmp_path / "shared", "thisrun2")
    assert newest_good(shared, own, [])[0] is None
    own.prune(keep_last=1)
    own.clean_leftovers(attempt=99)
    remove_local(own)
    assert sorted(str(path) for path in documents.rglob("*")) == before

    for step in (6, 7, 8):
        _save_of(own, step)
    Staging(own.path(9), 0, "thisrun2").create()
    assert [one.step for one in own.prune(keep_last=1)] == [6, 7]
    found, _ = newest_good(shared, own, [])
    assert found is not None
    assert found.step == 8
    remove_local(own)
    assert sorted(str(path) for path in documents.rglob("*")) == before

    remove_local(CheckpointStore(tmp_path / "nothing", "thisrun2", strict=True))
    mine = CheckpointStore(tmp_path / "fast" / "run", "thisrun2", strict=True)
    _save_of(mine, 1)
    remove_local(mine)
    assert not mine.directory.exists()


def _save_of(store: CheckpointStore, step: int) -> None:
    def write(staging: Staging) -> None:
        with staging.file("state.pt") as file:
            file.write(b"state")

    assert commit.write_checkpoint(store.path(step), 0, CommitInfo(step=step, run=store.run), 0, write)


def test_a_folder_under_the_name_of_a_checkpoint_is_set_aside_and_not_deleted(store: CheckpointStore) -> None:
    """blocked by: what has no COMMIT is renamed, not deleted"""
    store.path(5).mkdir(parents=True)
    (store.path(5) / "thesis.txt").write_text("mine")
    (store.directory / "bad-step-00000005").mkdir()
    save(store, 5)
    assert (store.directory / "bad-step-00000005.2" / "thesis.txt").read_text() == "mine"


def test_checkpoints_behind_a_link_are_refused(tmp_path: Path) -> None:
    """blocked by: folders of checkpoints must be no links"""
    elsewhere = CheckpointStore(tmp_path / "elsewhere")
    for step in (1, 2, 3):
        save(elsewhere, step)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere.directory)
    linked = CheckpointStore(tmp_path / "run" / "checkpoints", "thisrun2")
    for call in (linked.newest_good, lambda: linked.prune(1), lambda: linked.clean_leftovers(9)):
        with pytest.raises(BadCheckpoint, match="symbolic link"):
            call()
    assert len(elsewhere.committed()) == 3
    (tmp_path / "other").mkdir()
    shutil.move(elsewhere.path(3), tmp_path / "other" / "step-00000003")
    elsewhere.path(3).symlink_to(tmp_path / "other" / "step-00000003")
    assert [one.step for one in elsewhere.committed()] == [1, 2]
    assert elsewhere.newest_good()[1] == ["step-00000003 is damaged (a symbolic link, not a folder)"]
