"""Of two places the newest good checkpoint is taken, wherever it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trainer.checkpoint.commit import CommitInfo, Staging, write_checkpoint
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.tiers import newest_good
from trainer.core.errors import UserError


def save(store: CheckpointStore, step: int) -> Path:
    def write(staging: Staging) -> None:
        with staging.file("state.pt") as file:
            file.write(b"state %d" % step)

    assert write_checkpoint(store.path(step), 0, CommitInfo(step=step), 100, write)
    return store.path(step)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[CheckpointStore, CheckpointStore]:
    return CheckpointStore(tmp_path / "shared"), CheckpointStore(tmp_path / "local" / "run")


def test_the_newest_good_of_both_is_taken(stores: tuple[CheckpointStore, CheckpointStore]) -> None:
    shared, local = stores
    assert newest_good(shared, local, []) == (None, [])
    save(shared, 10)
    newest = save(local, 14)
    found, skipped = newest_good(shared, local, [])
    assert found is not None
    assert (found.path, skipped) == (newest, [])
    (newest / "state.pt").write_bytes(b"stote 14")
    found, skipped = newest_good(shared, local, [])
    assert found is not None
    assert found.path == shared.path(10)
    assert skipped == ["local step-00000014 is damaged (state.pt: checksum differs)"]
    assert not newest.exists()
    save(local, 10)
    found, _ = newest_good(shared, local, [])
    assert found is not None
    assert found.path == shared.path(10)  # of equals the one that every node sees
    found, _ = newest_good(shared, None, [])
    assert found is not None
    assert found.step == 10


@pytest.mark.parametrize(("began_at", "expected"), [(10, 10), (14, 14)])
def test_a_local_one_that_another_node_went_back_before_is_out_of_date(
    stores: tuple[CheckpointStore, CheckpointStore], began_at: int, expected: int
) -> None:
    shared, local = stores
    save(shared, 10)
    save(local, 14)
    starts = [(time.time() - 60, 0), (time.time() + 1, began_at)]
    found, _ = newest_good(shared, local, starts)
    assert found is not None
    assert found.step == expected


def test_a_local_checkpoint_does_not_hide_a_newer_format(stores: tuple[CheckpointStore, CheckpointStore]) -> None:
    from trainer.checkpoint import commit

    shared, local = stores
    save(local, 14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "format_of", lambda layout: commit.FORMAT + 1)
        save(shared, 20)
    with pytest.raises(UserError, match="checkpoint format"):
        newest_good(shared, local, [])
