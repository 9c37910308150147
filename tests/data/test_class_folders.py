"""Pictures and recordings in class folders: splits, bad files, random reading that resumes exactly."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from trainer.config.batch import BatchPlan
from trainer.core.errors import UserError
from trainer.data.audio_folder import AudioFolder, mel_filters
from trainer.data.class_folders import LabelledFiles
from trainer.data.image_folder import ImageFolder, read_image
from trainer.data.loader import resumable
from trainer.tasks.classification import IGNORED


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 30 images; the red value of an image is its number."""
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(30):
            pixels = numpy.random.default_rng(number).integers(0, 255, (24, 32, 3), numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    return tmp_path


def files(dataset: object) -> LabelledFiles:
    assert isinstance(dataset, LabelledFiles)
    return dataset


def test_images_are_split_by_file_and_labelled_by_folder(images: Path) -> None:
    data = ImageFolder(str(images), size=16, held_out=0.15)
    data.setup()
    parts = [files(part).files for part in (data.train, data.val, data.test)]
    paths = [path for part in parts for path, _ in part]
    assert len(paths) == len(set(paths)) == 60
    assert all(label == ["cat", "dog"].index(path.parent.name) for part in parts for path, label in part)
    assert data.facts() == {"input_shape": [3, 16, 16], "num_classes": 2}
    inputs, targets = next(iter(data.val_dataloader()))
    assert inputs.shape[1:] == (3, 16, 16)
    assert targets.dtype == torch.int64


def test_given_splits_are_kept(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "given"
    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            (root / split / label / "0.png").write_bytes((images / label / "0.png").read_bytes())
    data = ImageFolder(str(root), size=16)
    data.setup()
    assert [path.parts[-3] for path, _ in files(data.val).files] == ["val", "val"]


def test_a_bad_image_is_named_ignored_and_bounded(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageFolder(str(images), size=16, max_bad=1, num_workers=0)
    data.setup()
    train = files(data.train)
    (first, _), (second, _) = train.files[:2]
    first.write_bytes(first.read_bytes()[:60])
    for _ in range(2):
        image, label = train[0]
        assert label == IGNORED
        assert image.shape == (3, 16, 16)
    assert caplog.text.count(str(first)) == 1
    second.write_bytes(b"")
    with pytest.raises(UserError, match=r"more than data\.max_bad=1"):
        train[1]


def test_augmented_images_resume_and_do_not_depend_on_workers_or_ranks(images: Path) -> None:
    data = ImageFolder(str(images), size=16, batch_size=8)
    data.setup()

    def batches(workers: int, rank: int = 0, world_size: int = 1, step: int = 0) -> list[torch.Tensor]:
        data.num_workers = workers
        loader: Any = resumable(data.train_dataloader(), BatchPlan.of(8, None, world_size), rank, seed=1)
        loader.batch_sampler.seek(0, step)
        return [images for images, _ in loader]

    whole = torch.stack(batches(0))
    assert torch.equal(torch.stack(batches(2)), whole)
    assert torch.equal(torch.stack(batches(1, step=3)), whole[3:])
    halves = [torch.stack(batches(0, rank, 2)) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, dim=1), whole)


def test_reading_an_image(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (40, 20), (255, 0, 0)).save(path)
    image = read_image(path, 10, random=False)
    assert image.shape == (3, 10, 10)
    assert image[0].unique().tolist() == pytest.approx([(1 - 0.485) / 0.229])
    assert read_image(path, 10, random=True).shape == (3, 10, 10)


def test_no_classes_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="put the files of each class into a folder"):
        ImageFolder(str(tmp_path)).setup()
    with pytest.raises(UserError, match="does not exist"):
        ImageFolder(str(tmp_path / "nowhere")).setup()


def write_tone(path: Path, frequency: float, seconds: float, rate: int = 8000) -> None:
    path.parent.mkdir(exist_ok=True)
    times = numpy.arange(int(rate * seconds)) / rate
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((20_000 * numpy.sin(2 * math.pi * frequency * times)).astype("<i2").tobytes())


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    for number in range(30):
        write_tone(tmp_path / "high" / f"{number}.wav", 2000, 0.2 + number / 20)
        write_tone(tmp_path / "low" / f"{number}.wav", 300, 0.2 + number / 20)
    return tmp_path


def test_recordings_become_spectrograms(tones: Path) -> None:
    data = AudioFolder(str(tones), num_workers=0, mels=20)
    data.setup()
    assert data.shape() == [1, 20, 101]
    loudest = {}
    for image, label in files(data.val):  # type: ignore[attr-defined]
        assert list(image.shape) == data.shape()
        loudest[label] = int(image[0, :, :10].mean(1).argmax())
    assert loudest[0] > loudest[1] + 5


def test_recordings_that_cannot_be_used_are_named(tones: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = AudioFolder(str(tones), num_workers=0)
    data.setup()
    train = files(data.train)
    write_tone(train.files[0][0], 300, 1.0, rate=16_000)
    write_tone(train.files[1][0], 300, 0.01)
    train.files[2][0].write_bytes(b"RIFF")
    assert [train[index][1] for index in range(4)] == [IGNORED] * 3 + [train.files[3][1]]
    for reason in ("16 bits at 16000 Hz, not 16 at 8000", "shorter than 50 ms", "not a WAV file"):
        assert reason in caplog.text


def test_mel_filters_cover_the_spectrum() -> None:
    filters = mel_filters(20, 129, 8000)
    assert filters.shape == (20, 129)
    assert (filters.sum(0)[5:-5] > 0.2).all()
    assert (filters.argmax(1).diff() > 0).all()
