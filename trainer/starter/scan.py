"""Recognition of the data in a folder by names, sizes and headers. Decodes no file and imports no torch."""

from __future__ import annotations

import statistics
import wave
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.core.errors import EnvironmentFault, UserError
from trainer.data.images import size_and_mode
from trainer.data.locations import SHARDS
from trainer.data.untrusted import natural, open_regular, read_object, shown

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")
"""Suffixes of the image files that `trainer.data.image_folder` reads."""
AUDIO = (".wav",)
TEXTS = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".html", ".tex", ".xml")
TO_TOKENIZE = (".jsonl", ".parquet")
SPLITS = ("train", "val", "test")
NUM_HEADERS = 64
"""Number of headers that are read, evenly spread over the files."""


@dataclass(frozen=True)
class Images:
    """Image files, in one folder per class."""

    root: Path
    files: int
    """Number of training files, about: without folders for them, a tenth each is held out for validation and test."""
    classes: int
    side: int
    """Pixels of the shorter side; the median of the files."""
    grey: bool
    """Whether all are greyscale."""

    def __str__(self) -> str:
        kind = "grey images" if self.grey else "images"
        return f"{kind} in {self.classes} class folders, {self.files:,} to train on, {self.side} pixels a side"


@dataclass(frozen=True)
class AudioFiles:
    """WAV files, in one folder per class."""

    root: Path
    files: int
    """Number of training files, about."""
    classes: int
    rate: int
    """Most frequent sampling rate, in Hz."""
    seconds: float
    """90th percentile of the durations, in seconds."""

    def __str__(self) -> str:
        counted = f"audio files in {self.classes} class folders, {self.files:,} to train on"
        return f"{counted}, up to {self.seconds:g} s at {self.rate:,} Hz"


@dataclass(frozen=True)
class Texts:
    """Text files at any depth, or one text file."""

    root: Path
    files: int
    num_bytes: int
    suffixes: tuple[str, ...]

    def __str__(self) -> str:
        return f"text, {self.num_bytes:,} bytes in {self.files:,} files ({', '.join(self.suffixes)})"


@dataclass(frozen=True)
class Tokens:
    """Token shards, as `trainer data tokenize` writes them."""

    root: Path
    tokens: int
    """Number of training tokens."""
    vocab_size: int

    def __str__(self) -> str:
        return f"token shards, {self.tokens:,} tokens to train on, vocabulary of {self.vocab_size:,}"


@dataclass(frozen=True)
class IdxFiles:
    """The four IDX files of MNIST or Fashion-MNIST."""

    root: Path

    def __str__(self) -> str:
        return "the IDX files of MNIST or Fashion-MNIST: 60,000 grey images, 28x28, in 10 classes"


Contents = Images | AudioFiles | Texts | Tokens | IdxFiles


def scan(root: Path) -> Contents:
    """Return what a folder, or one text file, holds.

    Raises:
        UserError: If it holds no data to train on. The message names the contents.
        EnvironmentFault: If it holds images and Pillow is not installed.
    """
    if root.is_file():
        return Texts(root, 1, root.stat().st_size, (root.suffix or "no suffix",))
    if (root / SHARDS).is_file() and any(root.glob("train-*.bin")):
        return _tokens(root)
    if any(root.glob("train-images-idx3-ubyte*")):
        return IdxFiles(root)
    if (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file():
        fix = f"trainer fit data=hf_dataset data.root={root} model=transformer, or model=resnet_small for images"
        raise UserError(f"data={root} holds a Hugging Face dataset, for which you must name a model", fix)
    paths = [path for path in root.rglob("*") if not _hidden(path, root) and path.is_file()]
    kinds = Counter(_kind(path) for path in paths)
    most = max(("images", "audio files", "texts", "to tokenize"), key=lambda kind: kinds[kind])
    if not kinds[most]:
        raise _nothing(root, paths)
    if most == "to tokenize":
        tables = f"; Parquet also with data=hf_dataset data.root={root}"
        fix = f"trainer data tokenize {root} shards, then trainer fit data=./shards{tables}"
        raise UserError(f"data={root} holds JSON lines or Parquet files, which must be tokenized first", fix)
    chosen = sorted(path for path in paths if _kind(path) == most)
    if most == "texts":
        suffixes = tuple(suffix for suffix, _ in Counter(path.suffix.lower() for path in chosen).most_common())
        return Texts(root, len(chosen), sum(path.stat().st_size for path in chosen), suffixes)
    classes, files = _classes(root, chosen, most)
    return _images(root, chosen, files, classes) if most == "images" else _audio_files(root, chosen, files, classes)


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    known = {"images": IMAGES, "audio files": AUDIO, "texts": TEXTS, "to tokenize": TO_TOKENIZE}
    return next((kind for kind, suffixes in known.items() if suffix in suffixes), "other")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _classes(root: Path, paths: Sequence[Path], what: str) -> tuple[int, int]:
    """Return the number of classes, and the number of training files."""
    places = [path.relative_to(root).parts for path in paths]
    given = {place[0] for place in places if place[0] in SPLITS and len(place) > 2}
    if "train" in given and len(given) > 1:
        training = [place for place in places if place[0] == "train" and len(place) > 2]
        return len({place[1] for place in training}), len(training)
    classes = {place[0] for place in places if len(place) > 1}
    if len(classes) < 2:
        raise UserError(
            f"data={root} holds {len(paths)} {what}, but not in one folder per class",
            "put the files of each class into a folder: its name is the label",
        )
    return len(classes), round(0.8 * sum(len(place) > 1 for place in places))


def _spread(paths: Sequence[Path]) -> Sequence[Path]:
    return paths[:: max(1, len(paths) // NUM_HEADERS)]


def _images(root: Path, paths: Sequence[Path], files: int, classes: int) -> Images:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(f"data={root} holds images, which need Pillow", "pip install pillow") from error
    sides, greys = [], []
    for path in _spread(paths):
        try:
            size, mode = size_and_mode(path)
            sides.append(min(size))
            greys.append(mode in ("1", "L", "LA", "I;16"))
        except (OSError, ValueError):
            continue  # the data module names and counts the files that cannot be read
    if not sides:
        raise UserError(
            f"data={root}: none of {len(_spread(paths))} images can be read", "check that the files are valid"
        )
    return Images(root, files, classes, round(statistics.median(sides)), all(greys))


def _audio_files(root: Path, paths: Sequence[Path], files: int, classes: int) -> AudioFiles:
    rates, seconds = [], []
    for path in _spread(paths):
        try:
            with open_regular(path) as file, wave.open(file) as audio:
                rate, width = audio.getframerate(), audio.getnchannels() * audio.getsampwidth()
                there = (path.stat().st_size - file.tell()) // width  # the header may promise more
            if rate:
                rates.append(rate)
                seconds.append(min(audio.getnframes(), there) / rate)
        except (OSError, EOFError, wave.Error, ValueError, RuntimeError):
            continue
    if not rates:
        raise UserError(f"data={root}: none of {len(_spread(paths))} WAV files can be read", "use 16-bit PCM")
    longest = sorted(seconds)[9 * (len(seconds) - 1) // 10]
    return AudioFiles(root, files, classes, statistics.mode(rates), max(0.2, round(longest, 1)))


def _tokens(root: Path) -> Tokens:
    meta = read_object(root / SHARDS, "write the shards again: trainer data tokenize")
    return Tokens(root, natural(meta, root / SHARDS, "tokens", "train"), natural(meta, root / SHARDS, "vocab_size"))


def _nothing(root: Path, paths: Sequence[Path]) -> UserError:
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths).most_common(5)
    holds = ", ".join(f"{count:,} {shown(suffix)}" for suffix, count in suffixes) if paths else "nothing"
    return UserError(
        f"data={root} holds {holds}: no images, WAV files, text or token shards",
        "for other data use your own LightningDataModule: data._target_=my_package.MyData",
    )
