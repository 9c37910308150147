"""Reductions and gathers in a large job: over a tree, with the results and the failures of one group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from trainer.runtime import cpu_groups
from trainer.supervise.collectives import missing

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks have left: a tree of pairs, and rank 3 that stops before the last reduction."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(RANKS, Path(__file__).with_name("cpu_groups_rank.py"), [str(folder)], folder, 60.0)
    return folder


def test_a_tree_gives_every_rank_what_one_group_would(folder: Path) -> None:
    for rank in range(RANKS):
        results = json.loads((folder / f"results-{rank}.json").read_text())
        assert results["sum"] == [10, -6]
        assert results["max"] == [4, 0]
        assert results["min"] == [1, -3]
        assert results["started"] == [3]
        assert results["in a later group"] == [6]
    first = json.loads((folder / "results-0.json").read_text())
    assert first["gathered"] == [f"of rank {rank}" for rank in range(RANKS)]


def test_a_rank_that_stopped_is_named_and_no_other_waits_longer_than_the_timeout(folder: Path) -> None:
    for rank in range(RANKS - 1):  # all have ended within the time limit of the ranks
        assert "Timed out" in (folder / f"error-{rank}.json").read_text()
    found = missing({rank: folder / f"rank-{rank}.collectives.json" for rank in range(RANKS)})
    assert found is not None
    assert (found.ranks, found.waiting) == ([3], [2])
    assert found.what.startswith("gloo:all_reduce")
    assert "2 ranks from 2 to 3" in found.what


@pytest.mark.parametrize("world_size", [129, 1000, 4095, 4096])
def test_every_rank_is_in_the_tree_once_at_its_lowest_level(world_size: int) -> None:
    trees = [cpu_groups.members(rank, world_size) for rank in range(world_size)]
    top = trees[0][-1]
    lowest = [tree[0] for tree in trees]
    assert all(rank in group for rank, group in enumerate(lowest))
    for rank, tree in enumerate(trees):
        assert all(len(group) <= cpu_groups.FAN_OUT for group in tree)
        # Above each group but the top one there is another one, with its first rank.
        assert tree[-1] == top or tree[-1][0] != rank
        assert all(group in trees[member] for group in tree for member in group)
    assert max(map(len, trees)) == (3 if world_size <= 512 else 4)
