"""Orders that are looked up: each sample once, as random as a table, and in memory that the data do not change."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy
import pytest
import torch

from trainer.config.batch import BatchPlan
from trainer.data import order
from trainer.data.order import GlobalBatchSampler
from trainer.data.permutation import KeyedPermutation

SAMPLES = 103
GOLDEN = [76429254, 620642358, 203958254, 719040613]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 10, 100, 2**16 - 1, 2**16 + 1])
def test_each_element_once_and_another_order_for_another_key(length: int) -> None:
    one, same, other = (KeyedPermutation(length, *key)(torch.arange(length)) for key in ((5, 0), (5, 0), (5, 1)))
    assert sorted(one.tolist()) == list(range(length))
    assert torch.equal(one, same)
    if length > 9:
        assert not torch.equal(one, other)


def test_it_looks_random() -> None:
    """The element at a position, over many keys, and neighbours under one key."""
    drawn = numpy.array([KeyedPermutation(100, key)(torch.tensor([0, 37])).numpy() for key in range(3000)])
    for elements in drawn.T:
        squares = ((numpy.bincount(elements, minlength=100) - 30) ** 2 / 30).sum()
        assert 99 - 5 * 14 < squares < 99 + 5 * 14  # chi-squared with 99 degrees of freedom: deviation 14
    many = KeyedPermutation(10**12, 3)(torch.arange(100_000)).double() / 10**12
    assert numpy.histogram(many.numpy(), 20, (0, 1))[0] == pytest.approx(numpy.full(20, 5000), abs=400)
    for lag in (1, 2, 1000):
        assert abs(float(torch.corrcoef(torch.stack([many[lag:], many[:-lag]]))[0, 1])) < 0.02


def test_the_order_of_large_data_is_fixed_by_the_seed() -> None:
    """A change breaks the resume of every job that is running: golden values."""
    assert KeyedPermutation(10**9, 5, 0)(torch.arange(4)).tolist() == GOLDEN


def read(plan: BatchPlan, rank: int, epoch: int = 0, seek: int = 0, drop_last: bool = False) -> list[list[int]]:
    one = GlobalBatchSampler(SAMPLES, plan, rank, seed=5, drop_last=drop_last)
    one.seek(epoch, seek)
    return list(one)


@pytest.mark.parametrize("looked_up", [1, 7, 2**14])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (4, None), (1, 3), (2, 2), (4, 1), (3, 4)])
def test_looked_up_batches_are_the_same_at_any_world_size(
    world_size: int, micro_batch: int | None, looked_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MOST_IN_TABLE", 10)
    whole = KeyedPermutation(SAMPLES, 5, 3)(torch.arange(SAMPLES)).tolist()
    monkeypatch.setattr(order, "_LOOKED_UP", looked_up)
    plan = BatchPlan.of(12, micro_batch, world_size)
    ranks = [read(plan, rank, epoch=3) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for step in range(8):
        batches = [batch for one in ranks for batch in one[step * plan.accumulate : (step + 1) * plan.accumulate]]
        assert list(itertools.chain(*batches)) == whole[step * 12 : (step + 1) * 12]
    rest = [sample for one in ranks for batch in one[8 * plan.accumulate :] for sample in batch]
    assert rest == (whole[96:] + whole)[: len(rest)]
    assert read(plan, world_size - 1, epoch=3, seek=5) == ranks[-1][5 * plan.accumulate :]


def test_a_run_from_before_lookups_resumes_with_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BatchPlan.of(12, 3, 2)
    before = GlobalBatchSampler(SAMPLES, plan, 1, seed=5)
    whole = list(before)
    for _ in range(5):
        before.delivered()
    state = before.state(0, epoch_is_complete=False)
    assert set(state) == {"epoch", "step", "batches", "accumulate"}
    monkeypatch.setattr(order, "MOST_IN_TABLE", 10)
    resumed, new = (GlobalBatchSampler(SAMPLES, plan, 1, seed=5) for _ in range(2))
    resumed.load(state)
    assert list(resumed) == whole[5:]
    assert resumed.state(0, epoch_is_complete=False) == state
    assert list(new) != whole
    new.seek(0, 0)
    new.load(new.state(0, epoch_is_complete=False))
    assert list(new) == read(plan, 1, drop_last=True) != whole


def test_ids_of_any_batch_do_not_move_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MOST_IN_TABLE", 10)
    monkeypatch.setattr(order, "_LOOKED_UP", 6)
    plan = BatchPlan.of(12, 3, 2)
    one, seen = GlobalBatchSampler(SAMPLES, plan, 0, seed=5), []
    for batch in one:
        assert one.ids(0, 0) == seen[0] if seen else True
        seen.append(batch)
    assert seen == read(plan, 0, drop_last=True) == [one.ids(0, number) for number in range(len(one))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_trillion_samples_take_no_memory(shuffle: bool) -> None:
    tracemalloc.start()
    one = GlobalBatchSampler(10**12, BatchPlan.of(4096, 4, 512), 511, seed=5, shuffle=shuffle)
    one.seek(2, 200_000_000)
    ids = next(iter(one))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert len(set(ids)) == 4
    if not shuffle:
        first = 200_000_000 * 4096 + 511 * 8
        assert ids == list(range(first, first + 4))
