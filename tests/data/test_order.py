"""The order of the data: the same global batches at any world size, and after any seek."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data.order import EvaluationBatches, GlobalBatchSampler

SAMPLES, BATCH = 103, 12
FIRST_BATCH = [95, 77, 14, 84, 67, 18, 35, 75, 55, 44, 86, 48]


def sampler(world_size: int, rank: int, micro_batch: int | None = None) -> GlobalBatchSampler:
    return GlobalBatchSampler(SAMPLES, BatchPlan.of(BATCH, micro_batch, world_size), rank, seed=5)


def global_batches(world_size: int, micro_batch: int | None = None, epoch: int = 0) -> list[list[int]]:
    """The ids of each optimizer step over all ranks, in the order of ranks and micro-batches."""
    accumulate = BatchPlan.of(BATCH, micro_batch, world_size).accumulate
    streams = []
    for rank in range(world_size):
        one = sampler(world_size, rank, micro_batch)
        one.seek(epoch, 0)
        streams.append(list(one))
    steps = len(streams[0]) // accumulate
    return [
        list(
            itertools.chain.from_iterable(
                itertools.chain.from_iterable(stream[step * accumulate : (step + 1) * accumulate]) for stream in streams
            )
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (4, None), (1, 3), (2, 2), (4, 1), (3, 4)])
def test_the_global_batches_do_not_depend_on_the_split(world_size: int, micro_batch: int | None) -> None:
    for epoch in (0, 7):
        assert global_batches(world_size, micro_batch, epoch) == global_batches(1, None, epoch)


def test_an_epoch_reads_each_sample_at_most_once_and_drops_only_the_last_part() -> None:
    ids = list(itertools.chain.from_iterable(global_batches(2)))
    assert len(ids) == len(set(ids)) == SAMPLES // BATCH * BATCH
    assert global_batches(2, epoch=0) != global_batches(2, epoch=1)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, None), (1, 3), (2, 2), (4, 1), (3, 4)])
def test_without_drop_last_an_epoch_ends_with_a_smaller_step(world_size: int, micro_batch: int | None) -> None:
    """103 samples are 8 steps of 12 and one of 7: each sample once, and as many again as make 7 divide by the ranks."""
    plan = BatchPlan.of(BATCH, micro_batch, world_size)
    ranks = [GlobalBatchSampler(SAMPLES, plan, rank, seed=5, drop_last=False) for rank in range(world_size)]
    read = [list(one) for one in ranks]
    assert {len(batches) for batches in read} == {len(ranks[0])}
    assert ranks[0].steps_per_epoch == 9
    full = 8 * plan.accumulate
    for rank, batches in enumerate(read):
        assert batches[:full] == list(sampler(world_size, rank, micro_batch))
    rest = [identity for batches in read for batch in batches[full:] for identity in batch]
    order = [identity for batch in global_batches(1) for identity in batch]
    assert len(rest) == -(-7 // world_size) * world_size
    assert sorted({*rest, *order}) == list(range(SAMPLES))
    assert rest[7:] == order[: len(rest) - 7]


def test_a_smaller_last_step_is_resumed_and_counted() -> None:
    plan = BatchPlan.of(BATCH, 3, 2)
    one = GlobalBatchSampler(SAMPLES, plan, 0, seed=5, drop_last=False)
    whole = list(one)
    assert len(whole) == len(one) == 8 * 2 + 2  # 4 samples a rank in batches of 3
    assert [len(batch) for batch in whole[-3:]] == [3, 3, 1]
    one.seek(0, 8)
    assert one.position == (0, 8)
    assert list(one) == whole[16:]
    one.seek(0, 9)
    assert one.position == (1, 0)
    one.seek(0, 19)
    assert one.position == (2, 1)


def test_whole_steps_are_kept_where_the_strategy_needs_them() -> None:
    plan = replace(BatchPlan.of(BATCH, 3, 2), whole_steps=True)
    assert len(GlobalBatchSampler(SAMPLES, plan, 0, seed=5, drop_last=False)) == 8 * 2


def test_fewer_samples_than_a_global_batch_are_one_step() -> None:
    plan = BatchPlan.of(64, None, 2)
    assert [len(batch) for batch in GlobalBatchSampler(41, plan, 0, seed=0, drop_last=False)] == [21]


def test_the_order_is_fixed_by_the_seed() -> None:
    """A change of the order breaks the resume of every job that is running: golden values."""
    assert next(iter(sampler(1, 0))) == FIRST_BATCH


def test_position_counts_optimizer_steps_and_len_never_moves() -> None:
    one = sampler(2, 0, micro_batch=2)
    assert len(one) == 8 * 3
    for _ in range(4):
        one.delivered()
    assert one.position == (0, 1)
    assert len(one) == 24
    for _ in range(20):
        one.delivered()
    assert one.position == (1, 0)
    one.seek(3, 2)
    assert one.position == (3, 2)
    assert len(one) == 24
    one.seek(3, 8)
    assert one.position == (4, 0)


@pytest.mark.parametrize("step", range(8))
def test_seek_gives_the_rest_of_the_epoch(step: int) -> None:
    whole, sought = sampler(2, 1, 2), sampler(2, 1, 2)
    whole.seek(2, 0)
    sought.seek(2, step)
    assert list(sought) == list(whole)[step * 3 :]


def test_the_global_generator_is_not_drawn_from() -> None:
    before = torch.get_rng_state()
    list(sampler(1, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_more_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.batch_size=64: .* 40 training samples"):
        GlobalBatchSampler(40, BatchPlan.of(64, None, 2), 0, seed=0)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7, 16, 17, 100, 257])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_an_evaluation_reads_each_sample_once_in_as_many_batches_on_each_rank(
    samples: int, world_size: int, batch_size: int
) -> None:
    if samples < world_size:
        with pytest.raises(UserError, match="evaluation samples are too few for"):
            EvaluationBatches(samples, batch_size, 0, world_size)
        return
    ranks = [list(EvaluationBatches(samples, batch_size, rank, world_size)) for rank in range(world_size)]
    assert sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(ranks))) == list(range(samples))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(batch) <= max(2, batch_size) for batches in ranks for batch in batches)
    assert len(ranks[0]) == len(EvaluationBatches(samples, batch_size, 0, world_size))
    in_turn = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert list(itertools.chain.from_iterable(in_turn)) == list(range(samples))  # an early end leaves out the last ones

    sharers = [EvaluationBatches(samples, batch_size, rank, world_size) for rank in range(world_size)]
    for sharer in sharers:
        sharer.is_contiguous = True
    assert [index for sharer in sharers for batch in sharer for index in batch] == list(range(samples))
    assert [[len(batch) for batch in sharer] for sharer in sharers] == [list(map(len, batches)) for batches in ranks]
