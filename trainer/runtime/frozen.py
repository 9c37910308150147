"""Modules that a run has in its copy of the user's code are imported from there, whatever `sys.path` becomes.

The copy comes first on PYTHONPATH (`supervise/torchrun.py`). But much code puts the folder of its project before that,
where it is imported (`sys.path.insert(0, os.getcwd())`, rootutils); then the files as they are by now would win.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

VARIABLE = "TRAINER_FROZEN_CODE"
"""The folders of the copy, as in PYTHONPATH."""


def install() -> None:
    """Look there before `sys.path`, from now on; does nothing the second time, and outside of a run."""
    folders = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    if not folders or any(isinstance(finder, FrozenFirst) for finder in sys.meta_path):
        return
    at = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
    sys.meta_path.insert(at, FrozenFirst(folders))


class FrozenFirst(MetaPathFinder):
    """Finds top-level modules and packages in the copy; namespace packages stay Python's business."""

    def __init__(self, folders: list[str]) -> None:
        self._folders = folders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or "." in fullname:
            return None
        found = PathFinder.find_spec(fullname, self._folders)
        return found if found is not None and found.origin is not None else None
