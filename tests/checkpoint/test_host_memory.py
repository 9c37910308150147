"""Host memory of a save: a snapshot takes the size of the state, a streamed save one buffer, and both hold the step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.checkpoint import commit, host_copies, sharded
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.host_copies import MIB, CopyOptions, HostBuffers, choose
from trainer.checkpoint.io import CheckpointWriter, load_state
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.core.host_memory import available_bytes

SHAPES = {"model/embedding": (4096, 1024), "model/small": (7, 3), "model/bias": (3 * 2**18,), "optimizer/step": ()}
"""Sizes of 16 MiB, 84 bytes, 3 MiB and 4 bytes in float32."""
STATE_BYTES = 4 * (4096 * 1024 + 21 + 3 * 2**18 + 1)


REST = {"epoch": 3, "optimizers": {"groups": [], "values": {}}}
SHARDED = CommitInfo(step=1, layout="sharded")


class Allocated(TorchDispatchMode):
    """Adds up the host memory that operators allocate: at least as much as is in use at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)}
        for one in tree_leaves(outputs):
            if torch.is_tensor(one) and one.device.type == "cpu" and one.untyped_storage().data_ptr() not in given:
                self.total += one.untyped_storage().nbytes()
        return outputs


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Allocated:
    """Counts in the calling thread inside `with`, and always in the writer's thread."""
    mode, original = Allocated(), CheckpointWriter._guarded

    def counted(self: CheckpointWriter, *arguments: Any) -> None:
        with mode:
            original(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, "_guarded", counted)
    return mode


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as one that is not on the host."""
    monkeypatch.setattr(host_copies, "is_on_device", lambda tensor: True)
    monkeypatch.setattr(sharded, "is_on_device", lambda tensor: True)


def a_state() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def save(store: CheckpointStore, tensors: dict[str, torch.Tensor], copies: CopyOptions, mode: Allocated) -> Any:
    """Save sharded, then change the tensors at once, as the next step would."""
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    writer = CheckpointWriter(store, copies=copies)
    with mode:
        writer.save_sharded(tensors, REST, store.path(1), SHARDED, None)
    for tensor in tensors.values():
        tensor.fill_(7)
    writer.wait()
    writer.raise_if_failed()
    stored = StoredCheckpoint(store.path(1)).whole("")
    assert {name: torch.equal(stored[name], value) for name, value in expected.items()} == dict.fromkeys(expected, True)
    return writer.timing


@pytest.mark.usefixtures("on_device")
def test_a_streamed_save_takes_one_buffer_of_the_configured_size(tmp_path: Path, allocated: Allocated) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    timing = save(store, a_state(), CopyOptions("streamed", buffer_bytes=MIB), allocated)
    assert timing.host_bytes == MIB
    assert MIB <= allocated.total < MIB + 2**16, "a copy of the state, or of a whole tensor"


def test_a_snapshot_takes_the_size_of_the_state_and_no_more(tmp_path: Path, allocated: Allocated) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    timing = save(store, a_state(), CopyOptions("full"), allocated)
    assert timing.host_bytes == STATE_BYTES
    assert STATE_BYTES <= allocated.total < STATE_BYTES + 2**16, "a second copy"


def test_chunks_of_a_shard_have_their_place_in_the_whole_tensor() -> None:
    local = torch.arange(16.0).view(8, 2)
    shard = sharded.HostShard(local, torch.Size([4, 0]), torch.Size([20, 2]), chunk_bytes=3 * 8)
    items = shard.__create_write_items__("model/a", None)
    places = [(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)) for item in items]
    assert places == [((4, 0), (3, 2)), ((7, 0), (3, 2)), ((10, 0), (2, 2))]
    assert torch.equal(torch.cat([shard.chunk_at(item.index.offset) for item in items]), local)


@pytest.mark.usefixtures("on_device")
def test_auto_streams_where_a_snapshot_does_not_fit(
    tmp_path: Path, allocated: Allocated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "__defaults__", (lambda: STATE_BYTES,))
    store = CheckpointStore(tmp_path / "checkpoints")
    assert save(store, a_state(), CopyOptions(buffer_bytes=MIB), allocated).host_bytes == MIB
    assert "training waits meanwhile" in caplog.text


def test_a_private_copy_is_not_copied_again(tmp_path: Path, allocated: Allocated) -> None:
    """ZeRO gathers each parameter into a copy of its own."""
    store = CheckpointStore(tmp_path / "checkpoints")
    writer = CheckpointWriter(store)
    with allocated:
        writer.save_sharded(a_private := a_state(), REST, store.path(1), SHARDED, None, is_private=True)
    made, allocated.total = allocated.total, 0
    writer.wait()
    writer.raise_if_failed()
    assert made + allocated.total < STATE_BYTES + 2**16  # a_state itself
    assert set(StoredCheckpoint(store.path(1)).shapes) == set(a_private)


def test_streaming_ends_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for the reading of the tensors only; checksums, fsync and the commit follow in the background."""
    may_commit, original = threading.Event(), commit.commit

    def slow(*arguments: Any) -> None:
        assert may_commit.wait(30)
        original(*arguments)

    monkeypatch.setattr(commit, "commit", slow)
    for number, sharded_too in enumerate((False, True), 1):
        may_commit.clear()
        store = CheckpointStore(tmp_path / str(number))
        writer, weight = CheckpointWriter(store, copies=CopyOptions("streamed")), torch.ones(1000)
        if sharded_too:
            writer.save_sharded({"model/a": weight}, REST, store.path(1), SHARDED, None)
        else:
            writer.save({"a": weight}, store.path(1), CommitInfo(step=1))
        assert writer.in_flight
        weight.fill_(7)
        assert store.committed() == []
        may_commit.set()
        writer.wait()
        writer.raise_if_failed()
        loaded = (
            StoredCheckpoint(store.path(1)).whole("model/")["model/a"]
            if sharded_too
            else load_state(store.path(1))["a"]
        )
        assert loaded.sum() == 1000


def test_a_failure_while_streaming_does_not_leave_training_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    monkeypatch.setattr(commit, "require_space", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    writer = CheckpointWriter(store, copies=CopyOptions("streamed"))
    writer.save({"a": torch.ones(1)}, store.path(1), CommitInfo(step=1))  # returns
    writer.wait()
    with pytest.raises(commit.SaveFailed):
        writer.raise_if_failed()


def test_buffers_of_names_that_are_gone_are_freed() -> None:
    buffers = HostBuffers()
    for names in (("a", "b"), ("b", "c")):
        for name in names:
            buffers.copy(name, torch.ones(10))
        buffers.finish()
    assert sorted(buffers._buffers) == ["b", "c"]
    assert buffers.nbytes == 80


@pytest.mark.parametrize("threads", [1, 3])
def test_copies_in_host_memory_have_the_values_of_any_tensor(threads: int) -> None:
    """Large plain ones are moved by threads in pieces; of the others the bytes are not the values, or not in a row."""
    large = torch.randn(9 << 20)  # 36 MiB: three pieces
    given = {
        "large": large,
        "bfloat16": large[: 1 << 20].bfloat16(),
        "part": large[3 : 3 + (1 << 20)],
        "transposed": large[: 1 << 20].view(1024, 1024).t(),
        "conjugate": torch.randn(1 << 19, dtype=torch.complex64).conj(),
        "negative": torch.randn(1 << 19, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.randn(1 << 19)),
        "small": torch.tensor(3.0),
        "empty": torch.empty(0),
    }
    buffers = HostBuffers(threads)
    for _ in range(2):
        copies = {name: buffers.copy(name, tensor) for name, tensor in given.items()}
        buffers.finish()
        expected = {name: tensor.detach().clone() for name, tensor in given.items()}
        with torch.no_grad():
            large.add_(1)
        assert all(torch.equal(copies[name], expected[name]) for name in given)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_save_after_one_that_could_not_copy_has_the_new_values(tmp_path: Path, is_sharded: bool) -> None:
    """The failed one has copied the first tensor; by its address it would be taken for up to date."""
    store = CheckpointStore(tmp_path / "checkpoints")
    writer = CheckpointWriter(store)
    weight = torch.zeros(1 << 19)
    for step, bad in ((1, {"bad": object()}), (2, {})):
        weight.fill_(step)
        if is_sharded:
            state = {"optimizers": {"groups": [], "values": {}}, "extra": weight, **bad}
            writer.save_sharded({}, state, store.path(step), CommitInfo(step=step, layout="sharded"), None)
        else:
            writer.save({"extra": weight, **bad}, store.path(step), CommitInfo(step=step))
        writer.wait()
        failure = writer.take_failure()
        assert (failure is not None) == bool(bad)
    assert load_state(store.path(2))["extra"].unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("options", "needed", "held", "free", "expected"),
    [
        (CopyOptions(), 80, 0, 100, "full"),
        (CopyOptions(), 95, 0, 100, "streamed"),  # a tenth stays free
        (CopyOptions(ranks_on_node=2), 80, 0, 100, "streamed"),  # the other rank needs as much
        (CopyOptions(), 80, 80, 1, "full"),  # allocated at an earlier save
        (CopyOptions(), 80, 0, None, "full"),
        (CopyOptions("full"), 80, 0, 1, "full"),
        (CopyOptions("streamed"), 1, 0, 100, "streamed"),
    ],
)
def test_auto_takes_a_snapshot_where_it_fits(
    options: CopyOptions, needed: int, held: int, free: int | None, expected: str
) -> None:
    assert choose(options, needed, held, lambda: free) == expected


def test_free_memory_is_what_the_groups_of_this_process_leave(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 90 kB\nMemAvailable:   50 kB\n")
    assert available_bytes(tmp_path) == 50 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_1/step_0\n")
    job = tmp_path / "sys/fs/cgroup/slurm/job_1"
    (job / "step_0").mkdir(parents=True)
    for folder, limit in ((job, "30000"), (job / "step_0", "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("20000")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    assert available_bytes(tmp_path) == 15000
    assert available_bytes(tmp_path / "elsewhere") is None


def test_large_pinned_buffers_have_their_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's pool of pinned memory would round 5 MiB up to 8."""
    calls: list[tuple[str, int]] = []

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("register", size))
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unregister", address))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    buffer = host_copies.allocate(5 * MIB, torch.device("cuda"))
    assert (buffer.nbytes, calls) == (5 * MIB, [("register", 5 * MIB)])
    address = buffer.data_ptr()
    del buffer
    assert calls[1:] == [("unregister", address)]
