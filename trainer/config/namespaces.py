"""Packages with two names: Lightning's twins, and modules of this package that have moved.

`pytorch_lightning` is the package `lightning.pytorch` under another name. Installed side by side they are two copies
of the same source, with two classes of each name, and a module on one of them is no LightningModule of the other. Here
both names mean the same (`trainer/runtime/namespaces.py` does it for imports); this file is for what reads names as
text.
"""

from __future__ import annotations

TWINS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""The package of its own to the package inside `lightning`, module by module the same."""


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
