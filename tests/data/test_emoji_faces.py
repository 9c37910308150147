"""Emoji and their names, faces: data that comes in other packages."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from trainer.core.errors import UserError
from trainer.data import emoji, locations
from trainer.data.arrays import Arrays
from trainer.data.augment import CropAndFlip
from trainer.data.emoji import END, IGNORED, LETTERS, LONGEST, PAD, START, Emoji, EmojiDataset, encode
from trainer.data.faces import Faces


def named(direction: str, crop: CropAndFlip | None = None) -> EmojiDataset:
    names = ["CAT", "BLACK SUN"]
    images = torch.arange(2 * 3 * 4 * 4).to(torch.uint8).view(2, 3, 4, 4)
    return EmojiDataset(images, torch.tensor([encode(name) for name in names]), direction, crop)


def spelt(tokens: torch.Tensor) -> str:
    return "".join(LETTERS[token] for token in tokens.tolist() if token < len(LETTERS))


def test_reading_gives_the_image_and_the_letters_that_follow() -> None:
    images, tokens, following = named("read").gather(torch.tensor([1, 0]), 0)
    assert images.shape == (2, 3, 4, 4)
    assert float(images.max()) <= 1
    assert tokens.shape == following.shape == (2, LONGEST + 1)
    assert tokens[:, 0].tolist() == [START, START]
    assert [spelt(row) for row in tokens] == ["BLACK SUN", "CAT"]
    known = following[1][following[1] != IGNORED]
    assert (spelt(known), int(known[-1]), len(known)) == ("CAT", END, 4)


def test_drawing_gives_the_name_and_its_image() -> None:
    tokens, images = named("draw").gather(torch.tensor([0]), 0)
    assert spelt(tokens[0]) == "CAT"
    assert tokens[0, 3:].tolist() == [PAD] * (LONGEST - 3)
    assert torch.equal(images[0], torch.arange(48).view(3, 4, 4) / 255)


def test_a_name_of_the_longest_length_ends_too() -> None:
    data = EmojiDataset(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([encode("A" * LONGEST)]), "read", None)
    _, _, following = data.gather(torch.tensor([0]), 0)
    assert following[0].tolist() == [0] * LONGEST + [END]


def test_the_parts_have_no_name_in_common(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [f"FACE {number}" for number in range(100)]
    font = tmp_path / "font.ttf"
    font.touch()
    monkeypatch.setattr(emoji, "draw_emoji", lambda *_: {name: numpy.zeros((3, 8, 8), numpy.uint8) for name in names})
    data = Emoji(font=str(font), side=8)
    data.setup()
    parts = [part.targets for part in (data.train, data.val, data.test)]  # type: ignore[union-attr]
    assert sorted(spelt(row) for part in parts for row in part) == sorted(names)
    assert min(len(part) for part in parts) >= 5


@pytest.mark.skipif(not Path(locations.EMOJI[0]).is_file(), reason="apt-get install fonts-noto-color-emoji")
def test_the_font_draws_over_a_thousand() -> None:
    found = emoji.draw_emoji(Path(locations.EMOJI[0]), 8)
    assert len(found) > 1000
    assert all(image.shape == (3, 8, 8) for image in found.values())
    red, green, blue = found["RED APPLE"].reshape(3, -1).mean(1)
    assert red > max(green, blue)


def test_without_the_font_it_says_where_it_comes_from() -> None:
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        Emoji(font="nowhere.ttf").setup()
    with pytest.raises(UserError, match="use read or draw"):
        Emoji(direction="reed")


def test_faces_are_split_with_as_many_of_each_kind() -> None:
    data = Faces()
    data.setup()
    parts: list[Arrays] = [data.train, data.val, data.test]  # type: ignore[list-item]
    assert [len(part) for part in parts] == [120, 40, 40]
    assert [int(part.targets.sum()) for part in parts] == [60, 20, 20]
    everything = torch.cat([part.inputs for part in parts]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 200
    assert abs(float(everything.mean())) < 0.1
    first, again = (parts[0].gather(torch.tensor([3]), epoch)[0] for epoch in (0, 1))
    assert not torch.equal(first, again)
    assert torch.equal(parts[2].gather(torch.tensor([3]), 0)[0], parts[2].inputs[3:4])
