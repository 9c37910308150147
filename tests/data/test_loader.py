"""Rebuilt loaders: exact after a seek, with and without workers, for our datasets and for anybody's."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data import randomness
from trainer.data.arrays import Arrays
from trainer.data.augment import CropAndFlip
from trainer.data.loader import evaluation, first_samples, resumable
from trainer.data.order import GlobalBatchSampler
from trainer.data.randomness import OwnGenerators, seed_sample
from trainer.data.ranks import Ranks
from trainer.data.stream import Stream


class Noisy(Dataset[dict[str, Any]]):
    """A user's dataset, which draws from all three generators."""

    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "noise": torch.rand(2), "more": random.random() + numpy.random.random()}


class Listed(Noisy):
    """As Hugging Face datasets have it: a list of samples for a list of ids."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def rebuilt(dataset: Dataset[Any], world_size: int = 1, rank: int = 0, **keywords: Any) -> DataLoader[Any]:
    keywords.setdefault("shuffle", True)
    loader = DataLoader(dataset, batch_size=5, **keywords)
    return resumable(loader, BatchPlan.of(8, None, world_size), rank, seed=3)  # type: ignore[return-value]


def by_id(*loaders: DataLoader[Any]) -> dict[int, tuple[float, ...]]:
    return {
        int(number): (*noise.tolist(), float(more))
        for loader in loaders
        for batch in loader
        for number, noise, more in zip(batch["id"], batch["noise"], batch["more"], strict=True)
    }


def ids(loader: DataLoader[Any]) -> list[list[int]]:
    return [batch["id"].tolist() for batch in loader]


@pytest.mark.parametrize("kind", [Noisy, Listed])
def test_what_a_sample_draws_depends_on_seed_epoch_and_id_only(kind: type[Noisy]) -> None:
    alone = by_id(rebuilt(kind()))
    assert len(alone) == 40
    assert by_id(rebuilt(kind(), 2, 0), rebuilt(kind(), 2, 1)) == alone
    assert by_id(rebuilt(kind(), num_workers=2)) == alone
    later = rebuilt(kind())
    later.batch_sampler.seek(1, 0)  # type: ignore[union-attr]
    assert by_id(later) != alone


def test_persistent_workers_know_the_epoch() -> None:
    with_workers = rebuilt(Noisy(), num_workers=1, persistent_workers=True)
    without = rebuilt(Noisy())
    for _ in range(3):
        assert by_id(with_workers) == by_id(without)


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_what_was_handed_out_not_what_was_prefetched(workers: int) -> None:
    loader = rebuilt(Noisy(), num_workers=workers)
    reading = iter(loader)
    for _ in range(2):
        next(reading)
    assert loader.batch_sampler.position == (0, 2)  # type: ignore[union-attr]
    del reading


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7])
def test_a_new_loader_goes_on_where_another_stopped(workers: int, stop: int) -> None:
    whole = rebuilt(Noisy(), num_workers=workers)
    expected = [*ids(whole), *ids(whole)]
    first = rebuilt(Noisy(), num_workers=workers)
    read = list(itertools.islice(itertools.chain.from_iterable(iter(first) for _ in range(2)), stop))
    second = rebuilt(Noisy(), num_workers=workers)
    second.batch_sampler.seek(*first.batch_sampler.position)  # type: ignore[union-attr]
    rest = ids(second) + (ids(second) if stop < 5 else [])
    assert [batch["id"].tolist() for batch in read] + rest == expected


def test_the_main_process_keeps_its_generators() -> None:
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = random.random(), numpy.random.random(), torch.rand(1)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    for _ in rebuilt(Noisy()):
        pass
    assert (random.random(), numpy.random.random(), torch.rand(1)) == expected


def test_a_dataset_without_randomness_is_not_seeded() -> None:
    class Quiet(Noisy):
        random = False

        def __getitem__(self, index: int) -> int:  # type: ignore[override]
            return index + int(torch.randint(1000, ()))

    torch.manual_seed(0)
    first = next(iter(rebuilt(Quiet())))
    assert not torch.equal(first, next(iter(rebuilt(Quiet()))))


def test_a_random_collate_function_resumes_too() -> None:
    def noisy_collate(samples: list[dict[str, Any]]) -> torch.Tensor:
        return torch.rand(3)

    loader = rebuilt(Noisy(), collate_fn=noisy_collate)
    expected = list(loader)
    resumed = rebuilt(Noisy(), collate_fn=noisy_collate)
    resumed.batch_sampler.seek(0, 2)  # type: ignore[union-attr]
    assert torch.equal(torch.stack(list(resumed)), torch.stack(expected[2:]))


def test_arrays_are_gathered_and_augmented_by_sample() -> None:
    images = torch.arange(40 * 16).view(40, 1, 4, 4)

    def load(world_size: int, rank: int) -> DataLoader[Any]:
        return rebuilt(Arrays(images, torch.arange(40), CropAndFlip(9, padding=1)), world_size, rank)

    one = {int(number): image for inputs, targets in load(1, 0) for image, number in zip(inputs, targets, strict=True)}
    two = {
        int(number): image
        for rank in (0, 1)
        for inputs, targets in load(2, rank)
        for image, number in zip(inputs, targets, strict=True)
    }
    assert one.keys() == two.keys() == set(range(40))
    assert all(torch.equal(one[number], two[number]) for number in one)
    assert any(not torch.equal(one[number], images[number]) for number in one)
    again = load(1, 0)
    again.batch_sampler.seek(1, 0)  # type: ignore[union-attr]
    assert any(
        not torch.equal(image, one[int(number)])
        for inputs, targets in again
        for image, number in zip(inputs, targets, strict=True)
    )


def test_the_ids_of_each_batch_can_be_recorded() -> None:
    seen: list[tuple[int, int, list[int]]] = []
    loader = resumable(DataLoader(Noisy(), batch_size=1), BatchPlan.of(8, 2, 2), 1, seed=0)
    loader.batch_sampler.on_batch = lambda epoch, step, batch: seen.append((epoch, step, batch))  # type: ignore[union-attr]
    delivered = ids(loader)
    assert [batch for _, _, batch in seen] == delivered
    assert [(epoch, step) for epoch, step, _ in seen] == [(0, step) for step in range(5) for _ in range(2)]
    assert delivered[0] == [4, 5]
    assert delivered[1] == [6, 7]


@pytest.mark.parametrize("dataset", [Noisy(), Listed()], ids=["plain", "listed"])
def test_the_first_samples_over_and_over(dataset: Noisy) -> None:
    few = first_samples(DataLoader(dataset, batch_size=5, shuffle=True), 16)
    loader = resumable(few, BatchPlan.of(8, None, 1), 0, seed=3)
    for _ in range(2):
        assert ids(loader) == [list(range(8)), list(range(8, 16))]
    arrays = first_samples(DataLoader(Arrays(torch.arange(40), torch.arange(40)), batch_size=5), 8)
    (batch,) = resumable(arrays, BatchPlan.of(8, None, 1), 0, seed=3)
    assert batch[1].tolist() == list(range(8))


def test_unshuffled_loaders_stay_unshuffled() -> None:
    assert ids(rebuilt(Noisy(), shuffle=False))[0] == list(range(8))


def test_a_users_sampler_keeps_its_say() -> None:
    weights = [0.0] * 20 + [1.0] * 20

    def load(rank: int, world_size: int) -> DataLoader[Any]:
        sampler = WeightedRandomSampler(weights, 40)
        return rebuilt(Noisy(), world_size, rank, sampler=sampler, shuffle=None)

    whole = ids(load(0, 1))
    assert min(itertools.chain.from_iterable(whole)) >= 20
    halves = [ids(load(rank, 2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert ids(load(0, 1)) == whole


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_what_only_its_source_can_order_is_read_again_after_a_resume(
    stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Numbers(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(random.sample(range(100), 8))

    def load() -> Any:
        return resumable(DataLoader(Numbers(), batch_size=2), BatchPlan.of(2, None, 1), 0, 0)

    whole, first, second = load(), load(), load()
    expected = [batch.tolist() for _ in range(2) for batch in whole]
    assert expected[:4] != expected[4:]
    read = [batch.tolist() for batch in itertools.islice(first, stop)]
    second.load_state_dict(first.state_dict())
    rest = [batch.tolist() for _ in range(2) for batch in second]
    assert read + rest == expected
    assert (f"reading {stop} batches again" in caplog.text) == (stop > 0)


def test_whole_batches_of_the_users_own_are_shared_in_turn() -> None:
    class Buckets(Sampler[list[int]]):
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[list[int]]:
            return iter(random.sample([[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10]], 5))

    def load(rank: int, world_size: int) -> DataLoader[Any]:
        loader = DataLoader(Noisy(), batch_sampler=Buckets())
        return resumable(loader, BatchPlan.of(world_size, 1, world_size), rank, 3)  # type: ignore[return-value]

    whole = ids(load(0, 1))
    assert len(whole) == 5
    one, two = (ids(load(rank, 2)) for rank in (0, 1))
    assert [batch for pair in zip(one, two, strict=True) for batch in pair] == whole[:4]
    later = load(1, 2)
    later.load_state_dict({"epoch": 0, "step": 1, "batches": 1, "accumulate": 1})  # type: ignore[attr-defined]
    assert ids(later) == two[1:]


class Counting(Sampler[Any]):
    """Counts its epochs itself."""

    def __init__(self, as_batches: bool) -> None:
        self.as_batches, self.epoch = as_batches, 0

    def __len__(self) -> int:
        return 4 if self.as_batches else 16

    def __iter__(self) -> Iterator[Any]:
        first, self.epoch = 100 * self.epoch, self.epoch + 1
        drawn = list(range(first, first + 16))
        return iter([drawn[start : start + 4] for start in range(0, 16, 4)] if self.as_batches else drawn)


class Keeping(Counting):
    """Keeps a generator from one epoch to the next."""

    def __init__(self, as_batches: bool) -> None:
        super().__init__(as_batches)
        self.random = numpy.random.default_rng(4)

    def __iter__(self) -> Iterator[Any]:
        drawn = self.random.integers(0, 400, 16).tolist()
        return iter([drawn[start : start + 4] for start in range(0, 16, 4)] if self.as_batches else drawn)


@pytest.mark.parametrize("kind", [Counting, Keeping])
@pytest.mark.parametrize("as_batches", [False, True])
@pytest.mark.parametrize("created_in", [0, 2])
def test_a_sampler_that_lives_on_is_drawn_once_an_epoch_and_again_on_a_resume(
    kind: type[Counting], as_batches: bool, created_in: int
) -> None:
    def load() -> Any:
        how: Any = {"batch_sampler": kind(True)} if as_batches else {"sampler": kind(False), "batch_size": 4}
        loader = resumable(DataLoader(Noisy(400), **how), BatchPlan.of(4, None, 1), 0, 3, first_epoch=created_in)
        loader.begin_with(created_in)  # type: ignore[union-attr]
        return loader

    alone = kind(False)
    expected = [list(alone) for _ in range(4)]
    unharmed = load()
    assert [[one for batch in ids(unharmed) for one in batch] for _ in range(4)] == expected
    for epoch in range(4):
        resumed = load()
        place = {"epoch": created_in + epoch, "step": 1, "batches": 1, "accumulate": 1}
        resumed.load_state_dict(place)
        rest = [[one for batch in ids(resumed) for one in batch] for _ in range(epoch, 4)]
        assert rest == [expected[epoch][4:], *expected[epoch + 1 :]]


@pytest.mark.parametrize("mode", ["part", "with replacement"])
def test_samplers_of_torch_that_do_not_give_each_sample_once_keep_their_say(mode: str) -> None:
    chosen = (
        SubsetRandomSampler(range(16)) if mode == "part" else RandomSampler(Noisy(), replacement=True, num_samples=16)
    )
    read = [one for batch in ids(rebuilt(Noisy(), sampler=chosen, shuffle=None)) for one in batch]
    assert len(read) == 16
    assert (sorted(read) == list(range(16))) == (mode == "part")


@pytest.mark.parametrize("kind", [numpy.int64, torch.tensor])
def test_indices_of_numpy_and_torch_are_integers(kind: Any) -> None:
    class Permuted(Sampler[Any]):
        def __len__(self) -> int:
            return 40

        def __iter__(self) -> Iterator[Any]:
            return iter([kind(number) for number in reversed(range(40))])

    assert ids(rebuilt(Noisy(), sampler=Permuted(), shuffle=None))[0] == list(range(39, 31, -1))
    loader = rebuilt(Noisy(), sampler=Permuted(), shuffle=None)
    assert isinstance(loader.batch_sampler, GlobalBatchSampler)


def test_an_evaluation_of_a_part_reads_that_part() -> None:
    part = SubsetRandomSampler([3, 1, 4, 15, 9, 2, 6])
    shares = [evaluation(DataLoader(Noisy(), batch_size=2, sampler=part), rank, 2) for rank in (0, 1)]
    read = [one for share in shares for batch in ids(share) for one in batch]
    assert sorted(read) == [1, 2, 3, 4, 6, 9, 15]


def test_a_loader_that_does_not_read_through_its_sampler_is_refused() -> None:
    class Own(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            return iter([self.dataset[0]])

    loader = resumable(Own(Noisy(), batch_size=2), BatchPlan.of(4, None, 2), 0, 0)
    with pytest.raises(UserError, match=r"Own.__iter__ does not use its batch_sampler"):
        next(iter(loader))


def test_an_epoch_that_was_left_early_is_not_continued() -> None:
    loader, other = rebuilt(Noisy()), rebuilt(Noisy())
    next(iter(loader))
    other.batch_sampler.seek(1, 0)  # type: ignore[union-attr]
    assert ids(loader) == ids(other)


def test_positions_count_micro_batches() -> None:
    def load() -> Any:
        return resumable(DataLoader(Noisy(), batch_size=1), BatchPlan.of(8, 2, 1), 0, seed=0)

    whole, first, second, old = load(), load(), load(), load()
    expected = ids(whole)
    assert ids(itertools.islice(first, 5)) == expected[:5]  # type: ignore[arg-type]
    state = first.state_dict()
    second.load_state_dict(state)
    assert ids(second) == expected[5:]
    old.load_state_dict({"epoch": 0, "step": 1})  # of a checkpoint made before
    assert ids(old) == expected[4:]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_is_the_same_each_time(workers: int) -> None:
    loader = evaluation(DataLoader(Noisy(), batch_size=16, num_workers=workers), 0, 1)
    assert by_id(loader) == by_id(loader)
    shares = [evaluation(DataLoader(Noisy(), batch_size=16), rank, 3) for rank in range(3)]
    assert by_id(*shares) == by_id(loader)


class Everything(IterableDataset[int]):
    """Gives each worker process all that it has, or its share."""

    def __init__(self, shares: bool) -> None:
        self.shares = shares

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if self.shares and worker else (0, 1)
        return iter(range(first, 8, step))


@pytest.mark.parametrize("shares", [False, True])
def test_workers_that_all_read_the_whole_stream_are_told(shares: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The ranks take turns of batches, and so of workers: what one rank reads the other reads, too."""
    loader = DataLoader(Everything(shares), batch_size=1, num_workers=2, multiprocessing_context="fork")
    read = [int(batch) for batch in Stream(loader, Ranks(0, 2), 0, "a stream")]
    assert read == ([0, 2, 4, 6] if shares else list(range(8)))
    assert ("each of its 2 worker processes reads all samples" in caplog.text) == (not shares)


def _drawn() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(numpy.random.rand()), float(torch.rand(()))]


def test_python_s_generator_has_the_layout_that_is_exchanged() -> None:
    """Where this fails, a Python has come whose generator is another; everything works, 60 microseconds slower."""
    assert randomness.has_known_layout()


@pytest.mark.parametrize("known", [True, False])
def test_own_generators_keep_their_place_and_leave_the_others_theirs(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one sequence inside and one outside, also from what a checkpoint holds."""
    monkeypatch.setattr(randomness, "_HAS_KNOWN_LAYOUT", known)
    seed_sample(1, 2, 3)
    expected = [_drawn() for _ in range(4)]
    seed_sample(4, 5, 6)
    outside = [_drawn() for _ in range(4)]

    seed_sample(1, 2, 3)
    own = OwnGenerators()
    seed_sample(4, 5, 6)
    for turn in range(4):
        with own:
            assert _drawn() == expected[turn]
        assert _drawn() == outside[turn]
        own = OwnGenerators.from_plain(own.plain())


class Drawing:
    """A loader of one's own, whose batches are random numbers."""

    def __iter__(self) -> Iterator[list[float]]:
        for _ in range(3):
            yield _drawn()


class NotRandom(Drawing):
    random = False


def test_a_loader_that_says_that_it_is_not_random_sees_the_generators_as_they_are() -> None:
    def batches(source: Drawing) -> list[Any]:
        seed_sample(1, 2, 3)
        return list(Stream(source, Ranks(0, 1), seed=0, name="it"))

    seed_sample(1, 2, 3)
    outside = [_drawn() for _ in range(3)]
    assert batches(NotRandom()) == outside
    own = batches(Drawing())
    assert all(one != other for one, other in zip(own, outside, strict=True))
    assert _drawn() == outside[0]
