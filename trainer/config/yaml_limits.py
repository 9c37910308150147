"""Read YAML of unknown origin: bounded in size, in depth, and in what its aliases expand to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.files import open_regular, read_text

MOST_BYTES = 4 * 1024**2
_DEEPEST = 100
"""libyaml's composer recurses in C, without a check of the stack."""
_MOST_NODES = 1_000_000
"""Nodes of a document with its aliases expanded: 300 bytes of nested aliases stand for 10^9 of them."""


def load(path: Path) -> Any:
    """Return the plain content of a YAML file.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large.
        UnicodeDecodeError: It is not UTF-8.
        ValueError: It is nested too deeply, or its aliases expand to too much.
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_text(path, MOST_BYTES)
    require_small(text)
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:  # an anchor that holds itself, as a key
        raise ValueError("it is nested too deeply") from None


def require_small(text: str, most_nodes: int = _MOST_NODES, deepest: int = _DEEPEST) -> None:
    """Walk over the parser's events, which needs no stack and builds nothing.

    Raises:
        ValueError: The text is nested too deeply, in itself, or stands for too many nodes.
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                raise ValueError(f"the anchor {event.anchor} holds itself")
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
        if len(open_nodes) > deepest:
            raise ValueError("it is nested too deeply")
        if nodes > most_nodes:
            raise ValueError("its aliases expand to too much" if sizes else "it has too many values")


MOST_BYTES_WRITTEN, MOST_NODES_WRITTEN, DEEPEST_WRITTEN = 1 << 20, 20_000, 50
"""Limits for a config file that a job is composed from: OmegaConf takes a millisecond for ten values."""


def read(path: Path) -> str:
    """Return the text of a config file that a job is composed from, without a byte order mark.

    Raises:
        UserError: The file is too large, not UTF-8, nested too deeply, or stands for too many values.
        OSError: It cannot be read.
    """
    import yaml

    with open_regular(path) as file:
        data = file.read(MOST_BYTES_WRITTEN + 1)
    if len(data) > MOST_BYTES_WRITTEN:
        problem = f"{path}: larger than {MOST_BYTES_WRITTEN} bytes"
        raise UserError(problem, "a config file holds options, not data: split it")
    try:
        text = data.decode("utf-8-sig")
        require_small(text, MOST_NODES_WRITTEN, DEEPEST_WRITTEN)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason})", "save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}", "write fewer values, or read them as data") from None
    except yaml.YAMLError:
        pass  # reported by the reader
    return text
