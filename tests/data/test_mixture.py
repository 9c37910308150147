"""Mixtures: the shares are exact, and a source is read through before any of it is read again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from trainer.core.errors import UserError
from trainer.data import mixture as module
from trainer.data.arrays import ArrayDataModule, Arrays
from trainer.data.digits import Digits
from trainer.data.image_folder import ImageFolder
from trainer.data.mixture import GatherConcat, GatherMixture, ItemMixture, Mixture, apportion
from trainer.data.text import Text


def numbers(begin: int, count: int) -> Arrays:
    """Samples whose input says which they are."""
    values = torch.arange(begin, begin + count)
    return Arrays(values.float().unsqueeze(1), values)


def epoch(data: GatherMixture, number: int) -> list[int]:
    _, targets = data.gather(torch.randperm(len(data)), number)
    return targets.tolist()


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [([1, 1], 10, [5, 5]), ([1, 1, 1], 10, [4, 3, 3]), ([0.7, 0.3], 9, [6, 3]), ([1, 999], 10, [0, 10])],
)
def test_shares(weights: list[float], samples: int, expected: list[int]) -> None:
    assert apportion(weights, samples) == expected


def test_each_epoch_has_the_shares_and_each_pass_every_sample_once() -> None:
    """The small source is read four times in three epochs, the large one not yet once."""
    data = GatherMixture([numbers(0, 6), numbers(100, 50)], [8, 12], seed=3)
    read = [epoch(data, number) for number in range(3)]
    assert [Counter(one >= 100 for one in part) for part in read] == [Counter({False: 8, True: 12})] * 3
    counts = Counter(one for part in read for one in part)
    assert [counts[number] for number in range(6)] == [4] * 6
    assert sum(counts[number] > 1 for number in range(100, 150)) == 0
    assert sum(number >= 100 for number in counts) == 36


def test_large_sources_are_shuffled_without_a_table_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [epoch(GatherMixture([numbers(0, 6), numbers(100, 50)], [8, 12], 3), number) for number in range(9)]
    monkeypatch.setattr(module, "MOST_IN_TABLE", 10)
    tables, looked_up = (
        GatherMixture([numbers(0, 6), numbers(100, 50)], [8, 12], 3, shuffle) for shuffle in ("table", "keyed")
    )
    assert [sorted(epoch(tables, number)) for number in range(9)] == [sorted(part) for part in before]
    read = [epoch(looked_up, number) for number in range(25)]
    assert [sorted(part)[:8] for part in read[:9]] == [sorted(part)[:8] for part in before]
    assert set(Counter(one for part in read for one in part if one >= 100).values()) == {6}
    assert sorted(read[0]) != sorted(before[0])


def test_a_batch_is_in_the_order_of_its_ids_and_a_function_of_seed_and_epoch() -> None:
    def make(seed: int = 3) -> GatherMixture:
        return GatherMixture([numbers(0, 6), numbers(100, 50)], [8, 12], seed)

    ids = torch.tensor([19, 0, 7, 12, 3])
    inputs, targets = make().gather(ids, 5)
    assert torch.equal(inputs[:, 0].long(), targets)
    used = make()
    used.gather(torch.arange(20), 4)
    assert torch.equal(used.gather(ids, 5)[1], targets)
    assert torch.equal(torch.cat([make().gather(ids[i : i + 1], 5)[1] for i in range(5)]), targets)
    assert not torch.equal(make().gather(ids, 6)[1], targets)
    assert not torch.equal(make(4).gather(ids, 5)[1], targets)


def test_held_out_samples_are_read_once_each() -> None:
    data = GatherConcat([numbers(0, 3), numbers(100, 2)])
    assert data.gather(torch.arange(5), 0)[1].tolist() == [0, 1, 2, 100, 101]
    assert data.gather(torch.tensor([2, 3]), 0)[1].tolist() == [2, 100]


def text(folder: Path, word: str, **options: int) -> Text:
    folder.mkdir(exist_ok=True)
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{word} {number} " * 60)
    return Text(root=str(folder), cache=str(folder.parent / "cache"), **{"sequence_length": 16, **options})


def test_texts_by_weight(tmp_path: Path) -> None:
    data = Mixture({"a": text(tmp_path / "a", "aa"), "b": text(tmp_path / "b", "bb")}, {"a": 3, "b": 1}, samples=40)
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data.train, GatherMixture)
    inputs, _ = data.train.gather(torch.arange(40), 0)
    assert [int((inputs == ord(letter)).any(1).sum()) for letter in "ab"] == [30, 10]
    facts = data.facts()
    assert (facts["vocab_size"], facts["sequence_length"], facts["bytes_per_token"]) == (256, 16, 1.0)
    assert data.default_task == Text.default_task


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 1}, "no weight for b"), ({"a": 1, "b": 0}, r"data\.weights\.b=0: must be more than 0")],
)
def test_weights_that_cannot_be_meant(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture({"a": Digits(), "b": Digits()}, weights)


def test_sources_must_fit_each_other(tmp_path: Path) -> None:
    sources: dict[str, ArrayDataModule] = {
        "short": text(tmp_path / "a", "aa"),
        "long": text(tmp_path / "b", "bb", sequence_length=24),
    }
    data = Mixture(sources)
    data.setup("fit")
    with pytest.raises(UserError, match="sequence_length is 16 in short and 24 in long"):
        data.facts()


def folders(root: Path, begin: int, count: int, names: tuple[str, str] = ("cat", "dog")) -> ImageFolder:
    """Grey images whose value says which they are."""
    from PIL import Image

    for number in range(begin, begin + count):
        folder = root / names[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    return ImageFolder(str(root), size=8, grey=True, augment=False, num_workers=0, held_out=0.1)


def test_class_folders_by_weight_each_sample_once_a_pass(tmp_path: Path) -> None:
    data = Mixture({"a": folders(tmp_path / "a", 0, 20), "b": folders(tmp_path / "b", 100, 20)}, {"a": 3, "b": 1})
    data.setup("fit")
    assert isinstance(data.train, ItemMixture)
    sizes = [len(source.train) for source in data.sources.values()]  # type: ignore[attr-defined]
    assert len(data.train) == sum(sizes)
    ids = [(epoch, index) for epoch in (0, 1) for index in range(len(data.train))]
    images = torch.stack([data.train.of_epoch(*one)[0] for one in ids])
    values = ((images[:, 0, 0, 0] * 0.25 + 0.45) * 255).round().long().tolist()
    few, many = ([value for value in values if (value >= 100) is kind] for kind in (True, False))
    assert len(many) == 3 * len(few)
    for read, size in ((many, sizes[0]), (few, sizes[1])):
        counts = Counter(read)
        assert {counts[value] for value in counts} <= {len(read) // size, -(-len(read) // size)}
        assert len(counts) == min(size, len(read))
    assert data.facts() == {"input_shape": [1, 8, 8], "num_classes": 2}
    held_out = [len(source.val) for source in data.sources.values()]  # type: ignore[attr-defined]
    assert len(data.val) == sum(held_out)  # type: ignore[arg-type]


def test_class_folders_must_have_the_same_classes(tmp_path: Path) -> None:
    sources = {"a": folders(tmp_path / "a", 0, 20), "b": folders(tmp_path / "b", 100, 20, ("dog", "emu"))}
    data = Mixture(sources)
    data.setup("fit")
    with pytest.raises(UserError, match=r"a has the classes \['cat', 'dog'\] and b has \['dog', 'emu'\]"):
        data.facts()


def test_what_is_read_by_batch_and_what_is_not_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.scans is read batch by batch and data\.sources\.images item"):
        Mixture({"images": folders(tmp_path / "a", 0, 20), "scans": Digits()}).setup("fit")
