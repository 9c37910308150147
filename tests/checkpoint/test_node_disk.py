"""Checkpoints on the disks of two nodes, saved and restored by four real ranks, whatever dies, when and where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.faults import POINTS

RANKS = Path(__file__).with_name("node_ranks.py")
OF_A_SAVE = [point for point in POINTS if not point.startswith("prune")]
Case = list[list[Any]]


def run_cases(folder: Path, cases: list[Case], strategy: str = "fsdp") -> list[list[Any]]:
    ran = subprocess.run(
        [sys.executable, str(RANKS), str(folder), json.dumps([[strategy, case] for case in cases])],
        env={key: value for key, value in os.environ.items() if key != "TRAINER_FAULT"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]  # rank 0 prints, too


def expect(result: dict[str, Any], step: int, place: str = "node", skipped: tuple[str, ...] = ()) -> None:
    """Check that all ranks have chosen this step, each on its own node, and loaded it."""
    assert result["codes"] == [0] * 4, result
    for rank, found in enumerate(result["found"]):
        own = f"node-{rank // 2}" if place == "node" else place
        assert (found["step"], found["place"], found["good"]) == (step, own, True), result
    assert tuple(result["found"][0]["skipped"]) == skipped


def test_every_node_has_its_own_part_and_a_restart_loads_it(tmp_path: Path) -> None:
    (found,) = run_cases(tmp_path, [[["save"], ["restart"], ["restart"]]])
    assert found[0] == {
        "codes": [0] * 4,
        "found": [None] * 4,
        "held": ["node-0/step-00000020", "node-1/step-00000020"],
        "known": {"step-00000020": [0, 1]},
    }
    expect(found[1], 20)
    expect(found[2], 20)
    listed = [
        sorted(json.loads((tmp_path / "0" / "disk" / f"node-{node}" / "step-00000020" / "COMMIT").read_text())["files"])
        for node in (0, 1)
    ]
    of_rank_0 = ["shards/__0_0.distcp", "shards/index.json", "state.pt"]
    assert listed[0] == sorted([*of_rank_0, "shards/__1_0.distcp"])
    assert listed[1] == sorted([*of_rank_0, "shards/__2_0.distcp", "shards/__3_0.distcp"])


def test_a_kill_on_any_rank_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    faults = [(point, 0) for point in OF_A_SAVE]
    faults += [(point, 2) for point in ("staging.created", "commit.written", "commit.renamed", "folder.renamed")]
    faults += [("file.written", 3), ("prune.renamed", 2)]
    cases: list[Case] = [[["save", point, victim], ["restart"]] for point, victim in faults]
    cases.append([["save", "commit.renamed", 2], ["restart"], ["save"], ["restart"]])
    *found, (_, _, saved, again) = run_cases(tmp_path, cases)
    for (point, victim), (killed, restarted) in zip(faults, found, strict=True):
        assert killed["codes"][victim] == -signal.SIGKILL, (point, victim, killed)
        assert all(code in (0, 1, -signal.SIGKILL) for code in killed["codes"]), (point, victim, killed)
        has_committed = POINTS.index(point) >= POINTS.index("folder.renamed")
        expect(restarted, 20 if has_committed else 10)
    assert saved["codes"] == [0] * 4, "what the killed save has left is in the way of the next one"
    expect(again, 20)


def test_a_kill_while_the_nodes_get_what_rank_0_wrote_is_made_good_by_the_next_restart(tmp_path: Path) -> None:
    points = ["staging.created", "file.written", "commit.written"]
    cases: list[Case] = [[["save"], ["restart", point, 2], ["restart"]] for point in points]
    for point, (_, killed, restarted) in zip(points, run_cases(tmp_path, cases), strict=True):
        assert killed["codes"][2] == -signal.SIGKILL, (point, killed)
        expect(restarted, 20)


def test_without_the_part_of_a_node_the_run_directory_is_used(tmp_path: Path) -> None:
    damaged = "node-1/step-00000020/shards/__3_0.distcp"
    cases: list[Case] = [
        [["save"], ["lose node", 1], ["restart"], ["save"], ["restart"]],
        [["save"], ["lose node", 0], ["restart"]],
        [["save"], ["damage", damaged], ["restart"]],
        [["save"], ["restart", None, None, 1]],
        [["save"], ["restart", None, None, 4]],
    ]
    lost, lost_first, spoilt, spread, joined = run_cases(tmp_path, cases)
    expect(lost[2], 5, "shared")
    assert lost[2]["held"] == [], "what no attempt can use was kept"
    assert lost[2]["known"] == {}, "what was deleted is still recorded"
    expect(lost[4], 20)
    expect(lost_first[2], 5, "shared")
    expect(spoilt[2], 5, "shared", ("local step-00000020 is damaged (shards/__3_0.distcp: checksum differs)",))
    expect(spread[1], 5, "shared")
    expect(joined[1], 5, "shared")


def test_under_ddp_rank_0_gives_the_whole_state_to_the_other_nodes(tmp_path: Path) -> None:
    kept, lost, lost_first = run_cases(
        tmp_path,
        [
            [["save"], ["restart"], ["restart", "folder.renamed", 2], ["restart"]],
            [["save"], ["restart"], ["lose node", 1], ["restart"]],
            [["save"], ["lose node", 0], ["restart"]],
        ],
        "ddp",
    )
    assert kept[0]["held"] == ["node-0/step-00000020"]
    assert [result["known"] for result in kept[:2]] == [{"step-00000020": [0]}, {"step-00000020": [0, 1]}]
    for result in (kept[1], kept[3], lost[3]):
        expect(result, 20)
    assert kept[2]["codes"][2] == -signal.SIGKILL
    expect(lost_first[2], 5, "shared")


@pytest.mark.parametrize("place", ["node-0", "elsewhere"])
def test_the_part_of_a_node_is_no_checkpoint_for_other_ranks(tmp_path: Path, place: str) -> None:
    """A tensor of which other nodes have parts is refused, not left as it was."""
    import torch

    from trainer.checkpoint.stored import StoredCheckpoint
    from trainer.checkpoint.wellformed import BadCheckpoint

    run_cases(tmp_path, [[["save"]]])
    path = tmp_path / "0" / "disk" / "node-0" / "step-00000020"
    moved = path.rename(tmp_path / place)
    stored = StoredCheckpoint(moved)
    with pytest.raises(BadCheckpoint, match="has not all of model/a"):
        stored.read({"model/a": torch.zeros(11, 5)})
    with pytest.raises(BadCheckpoint, match="has not all of model/a"):
        stored.whole("model/")
