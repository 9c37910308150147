"""Options of each launcher; `cluster.name` chooses the class. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Local:
    """This machine."""

    name: str = "local"


CLUSTERS: dict[str, type] = {"local": Local}
"""Name to options class."""
