"""Read YAML of unknown origin: bounded in size, in depth, and in what its aliases expand to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.core.files import read_text

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
    if len(text) > _DEEPEST:
        _require_small(text, loader)
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:  # an anchor that holds itself, as a key
        raise ValueError("it is nested too deeply") from None


def _require_small(text: str, loader: Any) -> None:
    """Walk over the parser's events, which needs no stack and builds nothing."""
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
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
        if len(open_nodes) > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if nodes > _MOST_NODES:
            raise ValueError("its aliases expand to too much")
