"""What a folder holds, from names, sizes and headers: nothing is decoded, and torch is not imported."""

from __future__ import annotations

import json
import statistics
import wave
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.core.errors import EnvironmentFault, UserError
from trainer.data.locations import SHARDS

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")
"""What `trainer.data.image_folder` reads."""
RECORDINGS = (".wav",)
TEXTS = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".html", ".tex", ".xml")
TO_TOKENIZE = (".jsonl", ".parquet")
SPLITS = ("train", "val", "test")
LOOKED_AT = 64
"""Headers that are read, evenly spread over the files."""


@dataclass(frozen=True)
class Pictures:
    """In a folder a class."""

    root: Path
    files: int
    """To train on, about: a tenth for validation and a tenth for the test are taken off where no folder has them."""
    classes: int
    side: int
    """Pixels of the shorter side; the median."""
    grey: bool

    def __str__(self) -> str:
        kind = "grey pictures" if self.grey else "pictures"
        return f"{kind} in {self.classes} class folders, {self.files:,} to train on, {self.side} pixels a side"


@dataclass(frozen=True)
class Recordings:
    """WAV files in a folder a class."""

    root: Path
    files: int
    classes: int
    rate: int
    """Samples a second; the most frequent."""
    seconds: float
    """Nine of ten recordings are not longer."""

    def __str__(self) -> str:
        counted = f"recordings in {self.classes} class folders, {self.files:,} to train on"
        return f"{counted}, up to {self.seconds:g} s at {self.rate:,} Hz"


@dataclass(frozen=True)
class Texts:
    """Text files at any depth, or one file."""

    root: Path
    files: int
    num_bytes: int
    suffixes: tuple[str, ...]

    def __str__(self) -> str:
        return f"text, {self.num_bytes:,} bytes in {self.files:,} files ({', '.join(self.suffixes)})"


@dataclass(frozen=True)
class Tokens:
    """What `trainer data tokenize` writes."""

    root: Path
    tokens: int
    vocab_size: int

    def __str__(self) -> str:
        return f"token shards, {self.tokens:,} tokens to train on, {self.vocab_size:,} different ones"


@dataclass(frozen=True)
class IdxFiles:
    """The four files that MNIST and Fashion-MNIST come in."""

    root: Path

    def __str__(self) -> str:
        return "the IDX files of MNIST or Fashion-MNIST: 60,000 grey pictures, 28x28, in 10 classes"


Found = Pictures | Recordings | Texts | Tokens | IdxFiles


def look(root: Path) -> Found:
    """Raises UserError where the folder holds nothing that can be trained on as it is, and says what it holds."""
    if root.is_file():
        return Texts(root, 1, root.stat().st_size, (root.suffix or "no suffix",))
    if (root / SHARDS).is_file() and any(root.glob("train-*.bin")):
        return _tokens(root)
    if any(root.glob("train-images-idx3-ubyte*")):
        return IdxFiles(root)
    if (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file():
        fix = f"trainer fit data=hf_dataset data.root={root} model=transformer, or model=resnet_small for pictures"
        raise UserError(f"data={root} holds a Hugging Face dataset: the model must be said", fix)
    paths = [path for path in root.rglob("*") if not _hidden(path, root) and path.is_file()]
    kinds = Counter(_kind(path) for path in paths)
    most = max(("pictures", "recordings", "texts", "to tokenize"), key=lambda kind: kinds[kind])
    if not kinds[most]:
        raise _nothing(root, paths)
    if most == "to tokenize":
        tables = f"; Parquet also with data=hf_dataset data.root={root}"
        fix = f"trainer data tokenize {root} shards, then trainer fit data=./shards{tables}"
        raise UserError(f"data={root} holds JSON lines or Parquet, which are trained on as token shards", fix)
    chosen = sorted(path for path in paths if _kind(path) == most)
    if most == "texts":
        suffixes = tuple(suffix for suffix, _ in Counter(path.suffix.lower() for path in chosen).most_common())
        return Texts(root, len(chosen), sum(path.stat().st_size for path in chosen), suffixes)
    classes, files = _classes(root, chosen, most)
    return _pictures(root, chosen, files, classes) if most == "pictures" else _recordings(root, chosen, files, classes)


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    known = {"pictures": PICTURES, "recordings": RECORDINGS, "texts": TEXTS, "to tokenize": TO_TOKENIZE}
    return next((kind for kind, suffixes in known.items() if suffix in suffixes), "other")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _classes(root: Path, paths: Sequence[Path], what: str) -> tuple[int, int]:
    """Number of classes, and of files to train on."""
    places = [path.relative_to(root).parts for path in paths]
    given = {place[0] for place in places if place[0] in SPLITS and len(place) > 2}
    if "train" in given and len(given) > 1:
        training = [place for place in places if place[0] == "train" and len(place) > 2]
        return len({place[1] for place in training}), len(training)
    classes = {place[0] for place in places if len(place) > 1}
    if len(classes) < 2:
        raise UserError(
            f"data={root} holds {len(paths)} {what}, but not in a folder for each class",
            "put those of each class into a folder named by the class: the folder's name is the label",
        )
    return len(classes), round(0.8 * sum(len(place) > 1 for place in places))


def _spread(paths: Sequence[Path]) -> Iterable[Path]:
    return paths[:: max(1, len(paths) // LOOKED_AT)]


def _pictures(root: Path, paths: Sequence[Path], files: int, classes: int) -> Pictures:
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentFault(f"data={root} holds pictures, and they need Pillow", "pip install pillow") from error
    sides, greys = [], []
    for path in _spread(paths):
        try:
            with Image.open(path) as picture:  # reads the header only
                sides.append(min(picture.size))
                greys.append(picture.mode in ("1", "L", "LA", "I;16"))
        except OSError:
            continue  # the data module names and counts what cannot be read
    if not sides:
        raise UserError(f"data={root}: none of the pictures looked at can be read", "see whether they are whole")
    return Pictures(root, files, classes, round(statistics.median(sides)), all(greys))


def _recordings(root: Path, paths: Sequence[Path], files: int, classes: int) -> Recordings:
    rates, seconds = [], []
    for path in _spread(paths):
        try:
            with wave.open(str(path)) as recording:
                rates.append(recording.getframerate())
                seconds.append(recording.getnframes() / recording.getframerate())
        except (OSError, EOFError, wave.Error):
            continue
    if not rates:
        raise UserError(f"data={root}: none of the WAV files looked at can be read", "use 16-bit PCM")
    longest = sorted(seconds)[9 * (len(seconds) - 1) // 10]
    return Recordings(root, files, classes, statistics.mode(rates), max(0.2, round(longest, 1)))


def _tokens(root: Path) -> Tokens:
    meta = json.loads((root / SHARDS).read_text())
    return Tokens(root, int(meta["tokens"]["train"]), int(meta["vocab_size"]))


def _nothing(root: Path, paths: Sequence[Path]) -> UserError:
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths).most_common(5)
    holds = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes) if paths else "nothing"
    return UserError(
        f"data={root} holds {holds}: no pictures, WAV files, text or token shards",
        "for other data name a LightningDataModule of your own: data._target_=my_package.MyData",
    )
