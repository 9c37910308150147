"""The two names of Lightning: `pytorch_lightning` is the package `lightning.pytorch` under another name.

Installed side by side they are two copies of the same source, with two classes of each name, and a module on one of
them is no LightningModule of the other. Here both names mean the same (`trainer/runtime/namespaces.py` does it for
imports); this file is for what reads names as text.
"""

from __future__ import annotations

TWINS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""The package of its own to the package inside `lightning`, module by module the same."""


def canonical(path: str) -> str:
    """The dotted `path` with `lightning.pytorch` for `pytorch_lightning`, `lightning.fabric` for `lightning_fabric`."""
    top, dot, rest = path.partition(".")
    return TWINS.get(top, top) + dot + rest
