"""Sharded saves of two real ranks: whatever dies, when and where, the newest checkpoint loads and no rank hangs."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import commit, sharded
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.faults import POINTS
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.core.errors import UserError

RANKS = Path(__file__).with_name("sharded_ranks.py")
NOT_IN_THIS_SAVE = ("prune.renamed", "prune.removed")
OF_EVERY_RANK = ("file.created", "file.write", "file.written", "file.synced")


def run_cases(folder: Path, cases: list[tuple[str | None, int]]) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, str(RANKS), str(folder), json.dumps(cases)],
        env={key: value for key, value in os.environ.items() if key != "TRAINER_FAULT"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_a_kill_on_any_rank_at_any_moment_leaves_a_good_newest_checkpoint(tmp_path: Path) -> None:
    first = [(point, 0) for point in POINTS if point not in NOT_IN_THIS_SAVE]
    refused = [(f"file.write:{count}:ENOSPC", victim) for victim in (0, 1) for count in (1, 3)]
    refused += [("file.written:1:EIO", 1)]
    killed = [*first, *((point, 1) for point in OF_EVERY_RANK)]
    *found, layouts = run_cases(tmp_path, [(None, 0), *refused, *killed])
    whole = found.pop(0)
    for case in [found.pop(0) for _ in refused]:
        failed_alike(case)
    assert (whole["codes"], whole["step"], whole["good"]) == ([0, 0], 20, True)
    assert len(found) == len(first) + len(OF_EVERY_RANK)
    for case in found:
        assert case["codes"][case["victim"]] == -signal.SIGKILL, case
        assert case["codes"][1 - case["victim"]] in (0, 1), f"the other rank hung: {case}"
        assert case["good"], case
        assert case["skipped"] == [], case
        committed = case["victim"] == 0 and POINTS.index(case["point"]) >= POINTS.index("folder.renamed")
        assert case["step"] == (20 if committed else 10), case
        assert case["b"] == [float(case["step"])] * 3
    written_once(layouts)


def test_a_disk_that_is_full_for_several_ranks_is_named_with_what_helps() -> None:
    target = Path("runs/x/checkpoints/step-00000020")
    full, quota = (OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT))
    problems = {rank: sharded._Problem(f"OSError: {full}", commit.fix_of(full, target)) for rank in range(1, 7)}
    problems[0] = sharded._Problem(str(commit.failed(target, quota).message), commit.fix_of(quota, target))
    found = sharded._of_all(dict(sorted(problems.items())))
    assert found is not None
    assert found.text.count("No space left on device") == 3
    assert found.text.endswith("; and 3 more ranks")
    assert "rank 0: Checkpoint step-00000020 could not be written: [Errno 122] Disk quota exceeded" in found.text
    assert found.fix.startswith("Your disk quota is exhausted: ")
    assert found.fix.endswith("or put runs_dir on a larger filesystem.")
    unknown = sharded._of_all({1: sharded._Problem("KeyError: 'x'", commit.fix_of(KeyError("x"), target))})
    assert unknown == sharded._Problem("rank 1: KeyError: 'x'", "See the logs of those ranks.")
    assert sharded._of_all({}) is None


def failed_alike(case: dict[str, Any]) -> None:
    """Check that an error of the disk of one rank fails the save on both, says whose it was, and leaves nothing."""
    error = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[case["point"].rpartition(":")[2]]
    assert case["codes"] == [1, 1], case
    for text in case["errors"]:
        assert re.match(rf"SaveFailed: Checkpoint \S+ could not be written: rank {case['victim']}: OSError: ", text), (
            case
        )
        assert ("larger filesystem" in text) == ("ENOSPC" in case["point"]), case
        assert error in text, case
        assert f"rank {1 - case['victim']}" not in text, case
    assert (case["step"], case["good"], case["folders"]) == (10, True, ["step-00000010"]), case


def written_once(found: dict[str, Any]) -> None:
    """Check that four ranks, replicas or not, save the state once, copy what they save, and verify their own files."""
    assert found["codes"] == [0] * 4
    assert found["good"] == {"fsdp": True, "hsdp": True}
    for name, size in found["disk"].items():
        assert 1 <= size / found["state"] < 1.02, f"{name}: {size} bytes of {found['state']}"
    for rank, seen in enumerate(found["ranks"]):
        assert (seen["fsdp"], seen["hsdp"]) == (found["state"] / 4, found["state"] / 4)
        reason = "step-00000002 is damaged (shards/__3_0.distcp: checksum differs)"
        assert seen["newest good"] == [1, [reason]]
        own = [f"__{rank}_0.distcp"] * 2  # of step 2, then of step 1
        assert [name for name in seen["verified"] if name == own[0]] == (own if rank else [own[0]] * 3)
        assert rank == 0 or seen["verified"] == own, "a rank has read the files of another"


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    writer = CheckpointWriter(store, asynchronous=False)
    for step in (1, 2):
        tensors = {"model/a": torch.arange(6.0).view(2, 3) * step}
        state = {"epoch": 0, "optimizers": {"groups": [], "values": {}}}
        writer.save_sharded(tensors, state, store.path(step), CommitInfo(step=step, layout="sharded"), None)
    writer.raise_if_failed()
    return store


def test_a_shard_that_is_missing_swapped_or_damaged_is_found(saved: CheckpointStore) -> None:
    shards = saved.path(2) / "shards"
    names = sorted(path.name for path in shards.iterdir())
    assert names[1] == "index.json"
    assert len(names) == 2
    for name in names:
        original = (shards / name).read_bytes()
        (shards / name).unlink()
        assert "No such file" in saved.newest_good()[1][0]
        shutil.copy(saved.path(1) / "shards" / name, shards / name)
        swapped = (shards / name).read_bytes() != original
        assert bool(saved.newest_good()[1]) == swapped
        (shards / name).write_bytes(bytes([original[0] ^ 1]) + original[1:])
        assert "checksum differs" in saved.newest_good()[1][0]
        (shards / name).write_bytes(original)
    assert saved.newest_good()[1] == []


def test_reading_fills_what_is_given_and_refuses_another_model(saved: CheckpointStore) -> None:
    stored = StoredCheckpoint(saved.path(2))
    given = torch.zeros(2, 3)
    stored.read({"model/a": given})
    assert given.tolist() == [[0, 2, 4], [6, 8, 10]]
    with pytest.raises(UserError, match="model/b is missing"):
        stored.read({"model/b": given})
    with pytest.raises(UserError, match=r"model/a has shape \(2, 3\) in the checkpoint and \(4,\) in the model"):
        stored.read({"model/a": torch.zeros(4)})


def test_a_rank_without_rows_writes_nothing(saved: CheckpointStore) -> None:
    assert set(StoredCheckpoint(saved.path(1)).shapes) == {"model/a"}


def test_a_failed_sharded_save_is_loud_and_leaves_nothing(saved: CheckpointStore) -> None:
    writer = CheckpointWriter(saved, asynchronous=True)
    writer.save_sharded({}, {"bad": object()}, saved.path(3), CommitInfo(step=3), None)
    writer.wait()
    with pytest.raises(UserError, match="bad is a"):
        writer.raise_if_failed()
    assert sorted(path.name for path in saved.directory.iterdir()) == ["step-00000001", "step-00000002"]
