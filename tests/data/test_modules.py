"""The data modules: what they give, which samples are held out, what they say when something is missing."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy
import pytest
import torch

from trainer.core.errors import UserError
from trainer.data.arrays import Arrays, stratified_split
from trainer.data.baselines import bits_per_byte
from trainer.data.digit_strips import END, PAD, START, DigitStrips
from trainer.data.digits import Digits, _read_table
from trainer.data.fashion_mnist import FashionMNIST
from trainer.data.idx import read_idx
from trainer.data.text import Text
from trainer.data.tokens import TokenWindows


def arrays(*datasets: object) -> list[Arrays]:
    assert all(isinstance(dataset, Arrays) for dataset in datasets)
    return datasets  # type: ignore[return-value]


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    expected, found = load_digits(), _read_table()
    assert numpy.array_equal(found[:, :-1], expected.data)
    assert numpy.array_equal(found[:, -1], expected.target)


def test_digits_are_split_into_disjoint_parts_with_every_class() -> None:
    data = Digits()
    data.setup()
    parts = arrays(data.train, data.val, data.test)
    assert [len(part) for part in parts] == [1258, 270, 269]
    for part in parts:
        shares = torch.bincount(part.targets, minlength=10) / len(part)
        assert shares.min() > 0.08
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == (32, *data.facts()["input_shape"])
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert inputs.min() >= 0
    assert inputs.max() == 1


def test_strips_of_digits_say_what_they_show() -> None:
    read, draw = (DigitStrips(direction=direction) for direction in ("read", "draw"))
    scans = Digits()
    for data in (read, draw, scans):
        data.setup()
    ids = torch.arange(200)
    images, tokens, targets = read.val.gather(ids, 0)  # type: ignore[union-attr]
    digits, same_images = draw.val.gather(ids, 0)  # type: ignore[union-attr]
    assert images.shape == (200, *read.facts()["input_shape"])
    assert torch.equal(images, same_images)
    assert torch.equal(tokens[:, 1:], digits)
    assert (tokens[:, 0] == START).all()
    lengths = (digits != PAD).sum(1)
    assert set(lengths.tolist()) == {3, 4, 5, 6}
    (known,) = arrays(scans.val)
    for row in range(200):
        length = int(lengths[row])
        assert targets[row].tolist() == [*digits[row, :length].tolist(), END, *[-100] * (6 - length)]
        for place, cell in enumerate(images[row, 0].split(8, dim=1)):
            if place >= length:
                assert cell.eq(0).all()
                continue
            same = (known.inputs[:, 0] == cell).all(2).all(1)
            assert known.targets[same].unique().tolist() == [int(digits[row, place])]
    again = read.train.gather(ids, 1)[0]  # type: ignore[union-attr]
    assert not torch.equal(read.train.gather(ids, 0)[0], again)  # type: ignore[union-attr]


def test_a_stratified_split_is_a_partition() -> None:
    labels = numpy.repeat([0, 1, 2], [50, 30, 20])
    parts = stratified_split(labels, [0.6, 0.2], seed=1)
    assert numpy.array_equal(numpy.sort(numpy.concatenate(parts)), numpy.arange(100))
    assert [numpy.bincount(labels[part]).tolist() for part in parts] == [[30, 18, 12], [10, 6, 4], [10, 6, 4]]


def write_idx(path: Path, array: numpy.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    raw = header + array.astype(numpy.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def small_fashion(tmp_path: Path) -> Path:
    """240 train and 50 test images, whose first pixel says which image it is."""
    for name, number, suffix in (("train", 240, ".gz"), ("t10k", 50, "")):
        images = numpy.zeros((number, 28, 28))
        images[:, 0, 0] = numpy.arange(number)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", numpy.arange(number) % 10)
    return tmp_path


def test_fashion_mnist_from_files(small_fashion: Path) -> None:
    data = FashionMNIST(root=str(small_fashion), train_samples=200)
    data.setup()
    train, val, test = arrays(data.train, data.val, data.test)
    assert (len(train), len(val), len(test)) == (200, 20, 50)
    assert not set(train.inputs[:, 0, 0, 0].tolist()) & set(val.inputs[:, 0, 0, 0].tolist())
    inputs, _ = train.gather(torch.arange(4), 0)
    assert inputs.shape == (4, 1, 28, 28)
    assert inputs[0, 0, 5, 5] == pytest.approx(-0.2860 / 0.3530)


def test_augmentation_changes_training_images_only(small_fashion: Path) -> None:
    data = FashionMNIST(root=str(small_fashion), augment=True)
    data.setup()
    train, val, _ = arrays(data.train, data.val, data.test)
    train.inputs.random_(0, 255)
    ids = torch.arange(16)
    assert not torch.equal(train.gather(ids, 0)[0], train.gather(ids, 1)[0])
    assert torch.equal(train.gather(ids, 1)[0], train.gather(ids, 1)[0])
    assert torch.equal(val.gather(ids, 0)[0], val.gather(ids, 1)[0])


def test_missing_files_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist, or set data\.root"):
        FashionMNIST(root=str(tmp_path)).setup()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, numpy.zeros((10, 28, 28)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        read_idx(path)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for number in range(60):
        place = root / ("deep" if number % 2 else ".") / f"{number}.txt"
        place.write_text(f"File {number} says that {number} is a number.\n" * 20)
    (root / "copy.txt").write_text((root / "0.txt").read_text())
    (root / "empty.txt").touch()
    (root / "image.txt").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes("Straße".encode("latin-1"))
    return root


def text(root: Path, **keywords: object) -> Text:
    data = Text(root=str(root), cache=str(root.parent / "cache"), **{"sequence_length": 32, **keywords})  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def windows(dataset: object) -> TokenWindows:
    assert isinstance(dataset, TokenWindows)
    return dataset


def test_text_is_split_by_whole_files(texts: Path) -> None:
    splits = text(texts, held_out=0.1).meta["splits"]
    names = [set(splits[split]["files"]) for split in ("train", "val", "test")]
    assert sum(len(part) for part in names) == len(set.union(*names)) == 60
    assert all(names)
    (texts / "new.txt").write_text("Another one.\n" * 40)
    again = text(texts, held_out=0.1).meta["splits"]
    for split, part in zip(("train", "val", "test"), names, strict=True):
        assert part <= set(again[split]["files"])


def test_what_is_not_text_is_named(texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    text(texts)
    for reason in ("skipped 4 of 64 files", "empty.txt (empty)", "image.txt (binary)", "latin.txt (not UTF-8)"):
        assert reason in caplog.text
    assert "(duplicate)" in caplog.text


def test_windows_give_each_next_byte_once(texts: Path) -> None:
    data = text(texts)
    part = windows(data.val)
    stream = part.files[0].tolist()
    inputs, targets = part.gather(torch.arange(len(part)), 0)
    length = len(part) * 32
    assert inputs.flatten().tolist() == stream[:length]
    assert targets.flatten().tolist() == stream[1 : length + 1]
    assert data.facts() == {"vocab_size": 256, "sequence_length": 32, "bytes_per_token": 1.0}
    assert "says that" in data.tokenizer().decode(stream[:40])


def test_byte_pairs_are_learnt_once_and_give_the_text_back(texts: Path) -> None:
    data = text(texts, tokenizer="bpe", vocab_size=300)
    assert data.facts()["vocab_size"] <= 300
    assert data.facts()["bytes_per_token"] > 1.5
    stream = windows(data.train).files[0]
    end = data.tokenizer().end_of_text
    first = stream[: list(stream).index(end)]
    name = data.meta["splits"]["train"]["files"][0]
    assert data.tokenizer().decode(first.tolist()) == (texts / name).read_text()
    assert data.folder is not None
    before = (data.folder / "tokenizer.json").stat().st_mtime_ns
    again = text(texts, tokenizer="bpe", vocab_size=300)
    assert again.folder == data.folder
    assert (data.folder / "tokenizer.json").stat().st_mtime_ns == before


def test_the_cache_is_whole_or_absent(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", full_disk)
        with pytest.raises(OSError, match="No space"):
            text(texts)
    assert list((texts.parent / "cache").iterdir()) == []
    assert len(windows(text(texts).train)) > 0


def test_one_file_is_cut_in_order(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{number:05d} " for number in range(1000)))
    data = text(path)
    train, test = windows(data.train), windows(data.test)
    assert data.tokenizer().decode(train.files[0][:5].tolist()) == "00000"
    assert data.tokenizer().decode(test.files[0][-7:-1].tolist()) == "00999 "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "/nowhere"}, "data.root=/nowhere does not exist"),
        ({"tokenizer": "words"}, "data.tokenizer=words: unknown tokenizer"),
        ({"patterns": ["*.rs"]}, r"no text files in .* match \*\.rs"),
        ({"sequence_length": 10_000}, "use a smaller data.sequence_length"),
    ],
)
def test_mistakes_are_named(texts: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        text(Path(str(arguments.pop("root", texts))), **arguments)


def test_ngrams_against_counts_by_hand() -> None:
    """After `aaab`: Witten-Bell mixes 3/4 and 1/4 with the uniform distribution, two different bytes seen."""
    train = numpy.frombuffer(b"aaab", numpy.uint8)
    assert bits_per_byte(train, numpy.frombuffer(b"a", numpy.uint8), 1) == pytest.approx(-numpy.log2((3 + 2 / 256) / 6))
    unseen = bits_per_byte(train, numpy.frombuffer(b"zz", numpy.uint8), 2)
    assert unseen == pytest.approx(-numpy.log2((2 / 256) / 6))


def test_baselines_of_the_held_out_files(texts: Path) -> None:
    data = text(texts)
    found = data.baselines("test")
    train, test = (windows(part).files[0].astype(numpy.uint8) for part in (data.train, data.test))
    assert found == {"bpb_unigram": bits_per_byte(train, test, 1), "bpb_3gram": bits_per_byte(train, test, 3)}
    assert found["bpb_3gram"] < 2 < found["bpb_unigram"]
    assert text(texts, tokenizer="bpe", vocab_size=300).baselines("test") == {}


def test_ngrams_sum_to_one() -> None:
    train = numpy.frombuffer(b"the cat sat on the mat; the dog did not", numpy.uint8)
    total = sum(
        2 ** -bits_per_byte(train, numpy.frombuffer(b"h" + bytes([byte]), numpy.uint8), 2) for byte in range(256)
    )
    assert total == pytest.approx(1)
