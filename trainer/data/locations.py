"""Locations of the data modules' files. Imports no torch, because the config check uses it before a launch.

Each function returns the folder or file that `given`, an argument of the data module, refers to, relative to `cwd`. If
it does not exist they raise UserError, which names the argument `data.root` or `data.font`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.install import EXTRAS, pip_install
from trainer.core.near import did_you_mean
from trainer.core.text import one_line

FASHION_MNIST = ("/usr/share/datasets/fashion-mnist", "data/fashion-mnist")
"""Folder of Debian's package, and the usual folder in a project."""
_WITH_FSSPEC = ("fsspec", "aiohttp")
"""Packages of protocols that are always installed."""
EMOJI = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",)
SHARDS = "meta.json"
"""Written last into a folder of token shards."""
INDEX = "index.json"
"""Sizes and checksums of the files in a folder of token shards."""


def text(given: str, cwd: Path = Path()) -> Path:
    """Return the folder or file of texts."""
    path = cwd / Path(given).expanduser()
    if not path.exists():
        raise UserError(f"data.root={given} does not exist", "set data.root to a folder or a text file")
    return path


def class_folders(given: str, cwd: Path = Path()) -> Path:
    """Return the folder that holds one folder per class."""
    path = cwd / Path(given).expanduser()
    if not path.is_dir():
        raise UserError(f"data.root={given} does not exist", "set data.root to a folder with one folder per class")
    return path


def token_shards(given: str, cwd: Path = Path()) -> Path:
    """Return the folder of finished token shards; of a URL only the protocol is checked."""
    if is_remote(given):
        require_remote(given)
        return Path(given)
    path = cwd / Path(given).expanduser()
    if not (path / SHARDS).is_file():
        problem = f"data.root={given}: no finished token shards ({SHARDS} is missing)"
        raise UserError(problem, f"trainer data tokenize TEXT_FOLDER {given}")
    return path


def is_remote(root: str) -> bool:
    """Return whether `root` is a URL, not a path."""
    return "://" in root


def require_remote(url: str) -> None:
    """Check the protocol of a URL, without a connection.

    Raises:
        UserError: Nothing reads the protocol, or the URL holds a password.
        EnvironmentFault: The package that reads it is not installed.
    """
    from fsspec.registry import known_implementations, registry

    if "::" in url:  # fsspec would give the second to the first: unpack it, or evaluate the templates in it
        raise UserError(f"data.root={one_line(url)}: a chain of protocols", "name one folder: s3://BUCKET/SHARDS")
    protocol, known = url.partition("://")[0], [*known_implementations, *registry]
    if protocol not in known:
        fix = did_you_mean(f"{protocol}://", [f"{one}://" for one in known])
        raise UserError(
            f"data.root={one_line(url)}: no protocol is called {one_line(protocol)}", f"{fix}use s3:// or https://"
        )
    if urlsplit(url).password is not None:
        problem = f"data.root={protocol}://...: the URL holds a password, which the run directory would keep"
        raise UserError(problem, "remove it; credentials come from the environment")
    if protocol in registry:
        return
    package = known_implementations[protocol]["class"].partition(".")[0]
    if package not in _WITH_FSSPEC and find_spec(package) is None:
        fix = pip_install(protocol) if protocol in EXTRAS else f"pip install {package}"
        raise EnvironmentFault(f"data.root={one_line(url)} needs {package}", fix)


def fashion_mnist(given: str | None, cwd: Path = Path()) -> Path:
    """Return the folder of the IDX files."""
    for location in (given,) if given else FASHION_MNIST:
        path = cwd / Path(location).expanduser()
        if any(path.glob("train-images-idx3-ubyte*")):
            return path
    raise UserError(
        f"Fashion-MNIST (train-images-idx3-ubyte[.gz] and three more) is not in {given or ' or '.join(FASHION_MNIST)}",
        "apt-get install dataset-fashion-mnist, or set data.root=FOLDER to where the files are",
    )


def emoji(given: str | None, cwd: Path = Path()) -> Path:
    """Return the file of the font."""
    for location in (given,) if given else EMOJI:
        path = cwd / Path(location).expanduser()
        if path.is_file():
            return path
    raise UserError(
        f"Noto Color Emoji is not at {given or ' or '.join(EMOJI)}",
        "apt-get install fonts-noto-color-emoji, or set data.font=FILE",
    )
