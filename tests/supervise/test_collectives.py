"""Who has not come to a collective, by traces like torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.documentation import documented
from trainer.supervise.collectives import missing


def entry(number: int, done: bool, at: int, group: str = "0", name: str = "gloo:all_reduce") -> dict[str, Any]:
    return {
        "process_group": [group, "undefined"],
        "collective_seq_id": number,
        "profiling_name": name,
        "input_dtypes": ["Float"],
        "input_sizes": [[7]],
        "is_p2p": False,
        "retired": done,
        "time_created_ns": at,
    }


def traces(folder: Path, *ranks: list[dict[str, Any]] | None) -> dict[int, Path]:
    for rank, entries in enumerate(ranks):
        if entries is not None:
            (folder / f"{rank}.json").write_text(json.dumps({"entries": entries}))
    return {rank: folder / f"{rank}.json" for rank in range(len(ranks))}


def test_the_rank_that_has_not_come_is_named_with_what_the_others_wait_in(tmp_path: Path) -> None:
    waits = [entry(1, True, 10), entry(2, False, 20)]
    found = missing(traces(tmp_path, waits, [entry(1, True, 11)], waits))
    assert found is not None
    assert (found.ranks, found.waiting) == ([1], [0, 2])
    assert str(found) == (
        "rank 1 has not entered gloo:all_reduce of Float [7], number 2 of group 0 (gloo), in which ranks 0, 2 wait"
    )
    assert documented("reliability.md", "rank 1 on node7 ").shows(str(found))


def test_nobody_is_missing_where_all_have_come_or_nobody_waits(tmp_path: Path) -> None:
    waits = [entry(1, True, 10), entry(2, False, 20)]
    assert missing(traces(tmp_path, waits, waits)) is None
    assert missing(traces(tmp_path, [entry(1, True, 10)], [])) is None


def test_a_rank_without_a_trace_and_one_of_another_group_are_not_named(tmp_path: Path) -> None:
    waits = [entry(1, True, 10, group="3"), entry(2, False, 20, group="3")]
    assert missing(traces(tmp_path, waits, None, [entry(5, True, 5, group="4")])) is None
    (tmp_path / "1.json").write_text("cut sho")
    assert missing(traces(tmp_path, waits, None)) is None


def test_the_libraries_of_one_group_count_apart(tmp_path: Path) -> None:
    nccl = [entry(number, True, number, name="nccl:all_reduce") for number in range(1, 9)]
    waits = [*nccl, entry(2, False, 20)]
    found = missing(traces(tmp_path, waits, [*nccl, entry(1, True, 9)]))
    assert found is not None
    assert found.ranks == [1]
    assert missing(traces(tmp_path, [*nccl, entry(2, False, 20)], [*nccl, entry(2, False, 21)])) is None


def test_ranks_that_wait_for_each_other_are_not_named(tmp_path: Path) -> None:
    """Each waits in another group."""
    first = [entry(1, True, 1), entry(1, True, 2, group="1"), entry(2, False, 20)]
    second = [entry(1, True, 1), entry(1, True, 2, group="1"), entry(2, False, 21, group="1")]
    assert missing(traces(tmp_path, first, second)) is None


def test_at_the_end_of_a_chain_is_the_one_that_waits_for_nobody(tmp_path: Path) -> None:
    met = [entry(1, True, 1), entry(1, True, 2, group="1")]
    found = missing(traces(tmp_path, [*met, entry(2, False, 20)], [*met, entry(2, False, 21, group="1")], met))
    assert found is not None
    assert found.ranks == [2]


def test_a_record_that_was_never_retired_is_no_wait_when_a_later_one_was(tmp_path: Path) -> None:
    ours = [entry(1, True, 1), entry(2, False, 2), entry(3, True, 3)]
    assert missing(traces(tmp_path, ours, [entry(1, True, 1)])) is None


def test_of_several_the_oldest_is_told(tmp_path: Path) -> None:
    first = [entry(1, True, 1), entry(2, False, 30), entry(1, True, 2, group="1"), entry(2, False, 20, group="1")]
    second = [entry(1, True, 1), entry(1, True, 2, group="1")]
    found = missing(traces(tmp_path, first, second))
    assert found is not None
    assert "group 1" in found.what
