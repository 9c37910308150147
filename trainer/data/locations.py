"""Where the files of the data modules lie. Without torch: the prompt asks, too, before anything is launched.

Each function returns the folder or file that `given`, an argument of the data module, stands for, from `cwd`, and
raises UserError, which calls the argument `data.root` or `data.font`, where it is not there.
"""

from __future__ import annotations

from pathlib import Path

from trainer.core.errors import UserError

FASHION_MNIST = ("/usr/share/datasets/fashion-mnist", "data/fashion-mnist")
"""Where Debian's package puts the files, and the usual place in a project."""
EMOJI = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",)
SHARDS = "meta.json"
"""Written last into a folder of token shards."""


def text(given: str, cwd: Path = Path()) -> Path:
    path = cwd / Path(given).expanduser()
    if not path.exists():
        raise UserError(f"data.root={given} does not exist", "set data.root to a folder or a text file")
    return path


def class_folders(given: str, cwd: Path = Path()) -> Path:
    path = cwd / Path(given).expanduser()
    if not path.is_dir():
        raise UserError(f"data.root={given} does not exist", "set data.root to a folder with a folder for each class")
    return path


def token_shards(given: str, cwd: Path = Path()) -> Path:
    path = cwd / Path(given).expanduser()
    if not (path / SHARDS).is_file():
        problem = f"data.root={given} holds no finished token shards ({SHARDS} is missing)"
        raise UserError(problem, f"trainer data tokenize TEXT_FOLDER {given}")
    return path


def fashion_mnist(given: str | None, cwd: Path = Path()) -> Path:
    for place in (given,) if given else FASHION_MNIST:
        path = cwd / Path(place).expanduser()
        if any(path.glob("train-images-idx3-ubyte*")):
            return path
    raise UserError(
        f"Fashion-MNIST (train-images-idx3-ubyte[.gz] and three more) is not in {given or ' or '.join(FASHION_MNIST)}",
        "apt-get install dataset-fashion-mnist, or set data.root=FOLDER to where the files are",
    )


def emoji(given: str | None, cwd: Path = Path()) -> Path:
    for place in (given,) if given else EMOJI:
        path = cwd / Path(place).expanduser()
        if path.is_file():
            return path
    raise UserError(
        f"Noto Color Emoji is not at {given or ' or '.join(EMOJI)}",
        "apt-get install fonts-noto-color-emoji, or set data.font=FILE",
    )
