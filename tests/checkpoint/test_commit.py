"""The commit protocol without torch: damage is found, kills leave the old or the new state, failures say what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.checkpoint import commit
from trainer.checkpoint.commit import CommitInfo, SaveFailed, Staging
from trainer.checkpoint.faults import POINTS
from trainer.checkpoint.store import CheckpointStore
from trainer.core.errors import UserError

SAVER = """
import sys
from pathlib import Path
from trainer.checkpoint import commit
from trainer.checkpoint.store import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]))
for step in (10, 20, 30):
    def write(staging):
        with staging.file("state.pt") as file:
            for part in range(4):
                file.write(bytes([step + part]) * 1000)
        with staging.file("shards/one.bin") as file:
            file.write(b"x" * step)
    store.clean_leftovers(attempt=int(sys.argv[2]))
    commit.write_checkpoint(store.path(step), int(sys.argv[2]), commit.CommitInfo(step=step), 1000, write)
    store.prune(keep_last=2)
    print("saved", step, flush=True)
"""


def save(store: CheckpointStore, step: int, monitor_value: float | None = None, content: bytes = b"abcdef") -> bool:
    def write(staging: Staging) -> None:
        with staging.file("state.pt") as file:
            file.write(content)
        with staging.file("parts/more.bin") as file:
            file.write(b"more")

    info = CommitInfo(step=step, epoch=1, metrics={"val/acc": 0.5}, monitor="val/acc", monitor_value=monitor_value)
    return commit.write_checkpoint(store.path(step), 0, info, len(content), write)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_a_saved_checkpoint_is_good_and_described(store: CheckpointStore) -> None:
    assert save(store, 120, monitor_value=0.5)
    found, skipped = store.newest_good()
    assert found is not None
    assert skipped == []
    assert (found.path, found.step, found.epoch, found.bytes) == (store.path(120), 120, 1, 10)
    assert (found.metrics, found.monitor, found.monitor_value) == ({"val/acc": 0.5}, "val/acc", 0.5)
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000120"]


def test_saving_the_same_step_again_changes_nothing(store: CheckpointStore) -> None:
    save(store, 5)
    before = (store.path(5) / "COMMIT").read_bytes()
    assert not save(store, 5, content=b"other!")
    assert (store.path(5) / "COMMIT").read_bytes() == before


def test_an_uncommitted_or_damaged_folder_is_replaced(store: CheckpointStore) -> None:
    store.path(5).mkdir(parents=True)
    (store.path(5) / "state.pt").write_bytes(b"half")
    assert save(store, 5)
    (store.path(5) / "state.pt").write_bytes(b"abcdeX")
    assert save(store, 5)
    assert commit.verify(store.path(5)) == []


@pytest.mark.parametrize("name", ["state.pt", "parts/more.bin", "COMMIT"])
def test_one_flipped_bit_anywhere_is_found_and_the_one_before_is_used(store: CheckpointStore, name: str) -> None:
    save(store, 1)
    save(store, 2, monitor_value=0.25)
    path = store.path(2) / name
    original = path.read_bytes()
    for index in range(len(original)):
        damaged = bytearray(original)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        found, skipped = store.newest_good()
        assert found is not None
        assert found.step == 1, f"a flipped bit in byte {index} of {name} was not found"
        assert len(skipped) == 1
        assert "step-00000002" in skipped[0]
        assert name in skipped[0]
    path.write_bytes(original)
    assert store.newest_good()[1] == []


def test_truncated_missing_and_swapped_files_are_found(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4):
        save(store, step, content=bytes([step]) * 6)
    os.truncate(store.path(4) / "state.pt", 3)
    (store.path(3) / "parts/more.bin").unlink()
    shutil.copy(store.path(1) / "state.pt", store.path(2) / "state.pt")
    found, skipped = store.newest_good()
    assert found is not None
    assert found.step == 1
    assert "3 bytes instead of 6" in skipped[0]
    assert "parts/more.bin: No such file" in skipped[1]
    assert "state.pt: checksum differs" in skipped[2]
    assert [checkpoint.step for checkpoint in store.committed()] == [1, 2], "sizes alone do not show a swap"


def test_a_stale_commit_of_another_step_is_found(store: CheckpointStore) -> None:
    save(store, 1, content=b"first.")
    save(store, 2, content=b"second")
    shutil.copy(store.path(1) / "COMMIT", store.path(2) / "COMMIT")
    found, skipped = store.newest_good()
    assert found is not None
    assert found.step == 1
    assert skipped


def test_set_aside_makes_room_for_a_later_save(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    (store.path(2) / "state.pt").write_bytes(b"abcdeX")
    assert len(store.newest_good(set_aside=True)[1]) == 1
    assert store.newest_good()[1] == []
    assert (store.directory / "bad-step-00000002").is_dir()
    assert save(store, 2)


def test_when_all_are_bad_none_is_returned_with_the_reasons(store: CheckpointStore) -> None:
    assert store.newest_good() == (None, [])
    save(store, 1)
    (store.path(1) / "COMMIT").unlink()
    found, skipped = store.newest_good()
    assert found is None
    assert "COMMIT" in skipped[0]


def test_stray_files_and_folders_are_ignored(store: CheckpointStore) -> None:
    save(store, 7)
    (store.directory / "step-00000009").write_text("a file")
    (store.directory / "step-00000008.tmp3").mkdir()
    (store.directory / "hpc_ckpt_backup.ckpt").write_text("")
    (store.path(7) / "notes.txt").write_text("a user's")
    found, skipped = store.newest_good()
    assert found is not None
    assert (found.step, skipped) == (7, [])


def test_the_order_is_that_of_steps_and_not_of_clocks(store: CheckpointStore) -> None:
    for step in (12, 4, 100_000_000):
        save(store, step)
    os.utime(store.path(100_000_000), (0, 0))
    assert [checkpoint.step for checkpoint in store.committed()] == [4, 12, 100_000_000]


def test_a_newer_format_is_refused(store: CheckpointStore) -> None:
    save(store, 1)
    path = store.path(1) / "COMMIT"
    content = json.loads(path.read_text())
    del content["digest"]
    content["format"] = commit.FORMAT + 1
    content["digest"] = commit._digest(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"format {commit.FORMAT + 1}"):
        store.newest_good()
    assert store.committed() == []


def test_not_a_number_is_stored_as_unknown(store: CheckpointStore) -> None:
    save(store, 1, monitor_value=float("nan"))
    assert store.committed()[0].monitor_value is None


def test_prune_keeps_the_last_the_best_and_the_milestones(store: CheckpointStore) -> None:
    for step, value in ((10, 0.1), (20, 0.9), (30, None), (40, 0.9), (50, 0.2), (60, 0.3)):
        save(store, step, monitor_value=value)
    deleted = store.prune(keep_last=2, keep_best=1, mode="max", keep_every_n_steps=30)
    assert [checkpoint.step for checkpoint in deleted] == [10, 40]
    assert [checkpoint.step for checkpoint in store.committed()] == [20, 30, 50, 60]
    store.prune(keep_last=1, keep_best=1, mode="min")
    assert [checkpoint.step for checkpoint in store.committed()] == [50, 60]


def test_prune_counts_only_committed_ones_and_always_keeps_the_newest(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        save(store, step)
    (store.path(3) / "COMMIT").unlink()
    store.prune(keep_last=1)
    assert [checkpoint.step for checkpoint in store.committed()] == [2]
    store.prune(keep_last=0)
    assert [checkpoint.step for checkpoint in store.committed()] == [2]


def test_leftovers_of_dead_attempts_go_and_those_of_later_ones_stay(store: CheckpointStore) -> None:
    for attempt in (0, 1, 2):
        Staging(store.path(9), attempt).create()
    (store.directory / ".deleting-step-00000001").mkdir()
    store.clean_leftovers(attempt=1)
    assert [path.name for path in store.directory.iterdir()] == [".staging-attempt-02-step-00000009"]


def test_the_second_of_two_generations_cannot_overwrite(store: CheckpointStore) -> None:
    orphan = Staging(store.path(9), attempt=7)
    orphan.create()
    with orphan.file("state.pt") as file:
        file.write(b"orphan")
    save(store, 9)
    with pytest.raises(OSError) as caught:
        commit.commit(orphan, CommitInfo(step=9))
    assert "Another attempt is writing" in commit.failed(store.path(9), caught.value).fix
    assert (store.path(9) / "state.pt").read_bytes() == b"abcdef"


def run_saver(directory: Path, attempt: int, fault: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRAINER_FAULT"}
    if fault:
        environment["TRAINER_FAULT"] = fault
    return subprocess.run(
        [sys.executable, "-c", SAVER, str(directory), str(attempt)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_moment_leaves_a_good_newest_checkpoint(tmp_path: Path, point: str) -> None:
    """The third save (for `file.write` its middle) is cut short; everything announced before must still be there."""
    count = {"file.write": 13, "prune.renamed": 1, "prune.removed": 1}.get(point, 3)
    count = {"file.created": 5, "file.written": 5, "file.synced": 5}.get(point, count)
    killed = run_saver(tmp_path, 0, f"{point}:{count}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = [int(line.split()[1]) for line in killed.stdout.splitlines()]
    assert saved == [10, 20]
    store = CheckpointStore(tmp_path)
    found, skipped = store.newest_good()
    assert found is not None
    assert skipped == []
    assert found.step in (20, 30)
    assert found.step == 30 or "folder.renamed" not in POINTS[: POINTS.index(point) + 1]
    assert len(store.committed()) >= 2
    again = run_saver(tmp_path, 1, None)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    assert store.newest_good()[1] == []


def test_a_failing_write_leaves_nothing_and_says_what_to_do(store: CheckpointStore) -> None:
    def write(staging: Staging) -> None:
        with staging.file("state.pt"):
            raise OSError(28, "No space left on device")

    save(store, 1)
    with pytest.raises(SaveFailed, match="keep_last"):
        commit.write_checkpoint(store.path(2), 0, CommitInfo(step=2), 0, write)
    assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]


def test_too_little_room_is_refused_before_anything_is_written(store: CheckpointStore) -> None:
    with pytest.raises(SaveFailed, match=r"needs 1000000\.0 TB"):
        commit.write_checkpoint(store.path(2), 0, CommitInfo(step=2), 10**18, lambda staging: None)
    assert list(store.directory.iterdir()) == []


FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_commit import CheckpointStore, SaveFailed, commit, CommitInfo, save
store = CheckpointStore(Path(sys.argv[1]) / "checkpoints")
save(store, 1)
def write(staging):
    with staging.file("state.pt") as file:
        for _ in range(64):
            file.write(bytes(65536))
for expected in (0, 4 << 20):
    try:
        commit.write_checkpoint(store.path(2), 0, CommitInfo(step=2), expected, write)
    except SaveFailed as error:
        print(error)
assert [found.step for found in store.committed()] == [1]
assert save(store, 3), "after the failure there is room again"
for number in range(100):
    try:
        Path(sys.argv[1], str(number)).touch()
    except OSError:
        break
try:
    save(store, 4)
except SaveFailed as error:
    print(error)
print([found.step for found in store.committed()])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
def test_a_full_disk_and_no_inodes(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=1m,nr_inodes=64 none "$2" && exec "$0" -c "$1" "$2" "$3"'
    arguments = [sys.executable, FULL_DISK, str(tmp_path), str(Path(__file__).parent)]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=300).returncode != 0:
        pytest.skip("this container may not make a mount namespace")
    command = ["unshare", "-m", "sh", "-c", script, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if not line.startswith("  ")]
    assert "No space left on device" in lines[0]
    assert "needs 4.2 MB" in lines[1]
    assert "inodes" in lines[2] or "No space left" in lines[2]
    assert lines[3] == "[1, 3]"


@pytest.mark.executed
def test_torch_is_not_imported() -> None:
    code = "import sys, trainer.checkpoint.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
