"""Packages with two names: Lightning's twins, and modules of this package that have moved.

`pytorch_lightning` is the package `lightning.pytorch` under another name. Installed side by side they are two copies of
the same source, with two classes of each name: a LightningModule of one is not a LightningModule of the other. Here
both names mean the same. This file is for names that are read as text; `trainer/runtime/namespaces.py` is for imports.
"""

from __future__ import annotations

TWINS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""Standalone package to the identical package inside `lightning`."""


MOVED = {
    "trainer.resilience.inject": "trainer.faultbench.inject",
    "trainer.resilience.trace": "trainer.faultbench.trace",
}
"""Modules of this package that a frozen configuration may name, and their names since 0.2."""


def canonical(path: str) -> str:
    """Return the dotted `path` under the name that this package uses for it: Lightning's twin, or where it moved to."""
    top, dot, rest = moved(path).partition(".")
    return TWINS.get(top, top) + dot + rest


def moved(path: str) -> str:
    """Return the dotted `path` as it is named since 0.2 (`MOVED`)."""
    for before, now in MOVED.items():
        if path == before or path.startswith(f"{before}."):
            return now + path.removeprefix(before)
    return path
