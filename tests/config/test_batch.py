"""The split of a global batch."""

from __future__ import annotations

import pytest

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError


def test_without_micro_batch_each_rank_takes_its_part_in_one_pass() -> None:
    assert BatchPlan.of(32, None, 4) == BatchPlan(global_batch=32, micro_batch=8, accumulate=1, world_size=4)


def test_accumulation_follows_from_the_micro_batch() -> None:
    assert BatchPlan.of(32, 2, 4).accumulate == 4


def test_error_names_the_nearest_batch_sizes_that_work() -> None:
    with pytest.raises(UserError) as caught:
        BatchPlan.of(33, 4, 2)
    assert "data.batch_size=33" in caught.value.message
    assert "data.batch_size=32 or data.batch_size=40" in caught.value.fix


def test_error_names_a_micro_batch_that_works_when_only_that_is_wrong() -> None:
    with pytest.raises(UserError, match="micro_batch 5") as caught:
        BatchPlan.of(32, 5, 2)
    assert "data.micro_batch=4" in caught.value.fix


def test_below_one_unit_only_the_larger_size_is_named() -> None:
    with pytest.raises(UserError) as caught:
        BatchPlan.of(3, None, 4)
    assert caught.value.fix == "set data.batch_size=4"


@pytest.mark.parametrize(("size", "micro"), [(0, None), (-4, None), (8, 0)])
def test_sizes_below_one_are_refused(size: int, micro: int | None) -> None:
    with pytest.raises(UserError, match="at least one sample"):
        BatchPlan.of(size, micro, 2)


@pytest.mark.parametrize(
    ("sharing", "micro_batch", "expected"),
    [
        (1, 2, "4 ranks x 2 x 4 accumulated"),
        (2, None, "2 groups of 2 ranks x 16"),
        (4, None, "1 group of 4 ranks x 32"),
    ],
)
def test_the_split_names_ranks_that_share_samples(sharing: int, micro_batch: int | None, expected: str) -> None:
    assert BatchPlan.of(32, micro_batch, 4 // sharing).split(4) == expected
