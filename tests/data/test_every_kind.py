"""Each data module: the same global batches at 1, 2 and 4 ranks, and after a resume, with and without workers."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.saved_tables import images, save_parquet, save_splits, save_to_disk
from trainer.config.batch import BatchPlan
from trainer.data.arrays import ArrayDataModule
from trainer.data.audio_folder import AudioFolder
from trainer.data.digit_strips import DigitStrips
from trainer.data.digits import Digits
from trainer.data.faces import Faces
from trainer.data.fashion_mnist import FashionMNIST
from trainer.data.hf_dataset import hf_dataset
from trainer.data.image_folder import ImageFolder
from trainer.data.loader import OrderedLoader, resumable
from trainer.data.mixture import Mixture
from trainer.data.text import Text
from trainer.data.token_shards import TokenShards

BATCH, STEPS, SEED = 8, 3, 11
"""Samples of a global batch; batches that are looked at in each epoch."""


def digits(root: Path, workers: int) -> ArrayDataModule:
    return Digits()


def digit_strips(root: Path, workers: int) -> ArrayDataModule:
    return DigitStrips(train_samples=40)


def fashion_mnist(root: Path, workers: int) -> ArrayDataModule:
    from tests.data.test_modules import write_idx

    generator = numpy.random.default_rng(0)
    for name, count in (("train", 120), ("t10k", 20)):
        write_idx(root / f"{name}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(root / f"{name}-labels-idx1-ubyte", numpy.arange(count) % 10)
    return FashionMNIST(root=str(root), augment=True)


def text(root: Path, workers: int) -> ArrayDataModule:
    (root / "texts").mkdir(exist_ok=True)
    for number in range(8):
        (root / "texts" / f"{number}.txt").write_text(f"{number} times {number} is {number * number}.\n" * 40)
    return Text(root=str(root / "texts"), sequence_length=16, cache=str(root / "cache"))


def token_shards(root: Path, workers: int) -> ArrayDataModule:
    tokens = {"train": 2000, "val": 100, "test": 100}
    for split, count in tokens.items():
        for shard in range(2):
            (numpy.arange(count) + shard * 5000).astype(numpy.uint16).tofile(root / f"{split}-0000{shard}.bin")
    (root / "meta.json").write_text(json.dumps({"vocab_size": 60_000, "tokens": tokens, "bytes": tokens}))
    return TokenShards(str(root), sequence_length=16)


def image_folder(root: Path, workers: int) -> ArrayDataModule:
    generator = numpy.random.default_rng(0)
    for number in range(40):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), numpy.uint8)).save(folder / f"{number}.png")
    return ImageFolder(str(root), size=8, num_workers=workers)


def audio_folder(root: Path, workers: int) -> ArrayDataModule:
    generator = numpy.random.default_rng(0)
    for number in range(40):
        (root / f"class{number % 2}").mkdir(exist_ok=True)
        with wave.open(str(root / f"class{number % 2}" / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(generator.integers(-1000, 1000, 2400, numpy.int16).tobytes())
    return AudioFolder(str(root), seconds=0.2, mels=8, num_workers=workers)


def mixture(root: Path, workers: int) -> ArrayDataModule:
    """The one that is augmented is small and is read through more than once in an epoch."""
    (root / "garments").mkdir(exist_ok=True)
    garments = fashion_mnist(root / "garments", 0)
    more = FashionMNIST(root=str(root / "garments"), train_samples=20, augment=True, seed=1)
    return Mixture({"few": more, "all": garments}, {"few": 1, "all": 1}, seed=SEED)


def mixed_folders(root: Path, workers: int) -> ArrayDataModule:
    """Augmented, and one of them read twice in an epoch."""
    for name in ("a", "b"):
        (root / name).mkdir(exist_ok=True)
    sources = {name: image_folder(root / name, 0) for name in ("a", "b")}
    return Mixture(sources, {"a": 3, "b": 1}, seed=SEED, num_workers=workers)


def faces(root: Path, workers: int) -> ArrayDataModule:
    return Faces()


def text_table(root: Path, workers: int) -> ArrayDataModule:
    save_to_disk(root / "saved", {"text": [f"{number} times {number} is {number**2}." for number in range(90)]})
    return hf_dataset(str(root / "saved"), sequence_length=16, cache=str(root / "cache"))


def text_classes(root: Path, workers: int) -> ArrayDataModule:
    numbers = range(90)
    columns = {"text": [f"{number} is a number." for number in numbers], "odd": [number % 2 for number in numbers]}
    save_to_disk(root / "saved", columns)
    return hf_dataset(str(root / "saved"), label_column="odd", sequence_length=16, cache=str(root / "cache"))


def token_table(root: Path, workers: int) -> ArrayDataModule:
    splits = {"train": 60, "validation": 10, "test": 10}
    save_splits(
        root / "saved",
        {name: {"input_ids": [list(range(i, i + 9)) for i in range(rows)]} for name, rows in splits.items()},
    )
    return hf_dataset(str(root / "saved"), sequence_length=8, cache=str(root / "cache"))


def image_table(root: Path, workers: int) -> ArrayDataModule:
    numbers = range(44)
    save_to_disk(root / "saved", {"image": images(numbers), "label": [number % 2 for number in numbers]})
    return hf_dataset(str(root / "saved"), size=8, num_workers=workers)


def parquet_images(root: Path, workers: int) -> ArrayDataModule:
    for part in range(2):
        numbers = range(part * 25, part * 25 + 25)
        columns = {"image": images(numbers), "label": [number % 2 for number in numbers]}
        save_parquet(root / "saved" / f"{part}.parquet", columns)
    return hf_dataset(str(root / "saved"), size=8, num_workers=workers, cache=str(root / "cache"))


Kind = Callable[[Path, int], ArrayDataModule]
KINDS: list[tuple[Kind, int]] = [
    (digits, 0),
    (digit_strips, 0),
    (fashion_mnist, 0),
    (text, 0),
    (token_shards, 0),
    (mixture, 0),
    (mixed_folders, 0),
    (mixed_folders, 1),
    (faces, 0),
    (image_folder, 0),
    (image_folder, 1),
    (audio_folder, 0),
    (audio_folder, 1),
    (text_table, 0),
    (text_classes, 0),
    (token_table, 0),
    (image_table, 0),
    (image_table, 1),
    (parquet_images, 1),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-workers")
def data(request: pytest.FixtureRequest, tmp_path: Path) -> ArrayDataModule:
    make, workers = request.param
    module: ArrayDataModule = make(tmp_path, workers)
    module.prepare_data()
    module.setup("fit")
    return module


def loader(data: ArrayDataModule, rank: int, ranks: int, micro_batch: int | None = None) -> OrderedLoader:
    found = data.train_dataloader()
    assert type(found) is DataLoader
    made = resumable(found, BatchPlan.of(BATCH, micro_batch, ranks), rank, SEED)
    assert isinstance(made, OrderedLoader)
    return made


def read(loader: OrderedLoader, batches: int) -> list[tuple[torch.Tensor, ...]]:
    """The next batches of the epoch; at least that many are left in it."""
    return [batch for _, batch in zip(range(batches), loader, strict=False)]


def joined(streams: list[list[tuple[torch.Tensor, ...]]]) -> list[torch.Tensor]:
    """Inputs, then targets, of all the batches of the ranks, rank by rank in each step."""
    steps = [batch for step in zip(*streams, strict=True) for batch in step]
    return [torch.cat(parts) for parts in zip(*steps, strict=True)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_global_batches_are_the_same_at_1_2_and_4_ranks(data: ArrayDataModule) -> None:
    for epoch in (0, 1):
        found = {}
        for ranks in (1, 2, 4):
            loaders = [loader(data, rank, ranks) for rank in range(ranks)]
            for one in loaders:
                one.load_state_dict({"epoch": epoch, "step": 0})
            found[ranks] = joined([read(one, STEPS) for one in loaders])
        assert found[1][0].shape[0] == STEPS * BATCH
        assert same(found[2], found[1])
        assert same(found[4], found[1])


def test_a_resume_reads_on_exactly_at_another_number_of_ranks_too(data: ArrayDataModule) -> None:
    """Stopped after a step of two micro-batches each on 2 ranks; resumed on 1, 2 and 4."""
    whole = joined([read(loader(data, 0, 1), STEPS)])
    first = [loader(data, rank, 2, micro_batch=2) for rank in range(2)]
    for one in first:
        assert len(read(one, 2)) == 2
    states = [one.state_dict() for one in first]
    assert states == [{"epoch": 0, "step": 1, "batches": 2, "accumulate": 2}] * 2
    for ranks in (1, 2, 4):
        resumed = [loader(data, rank, ranks) for rank in range(ranks)]
        for one in resumed:
            one.load_state_dict(states[0])
        rest = joined([read(one, STEPS - 1) for one in resumed])
        assert same(rest, [part[BATCH:] for part in whole])
