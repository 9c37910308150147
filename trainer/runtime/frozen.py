"""Import the user's modules from the code snapshot of the run, whatever is put into `sys.path`.

The snapshot is first in PYTHONPATH (`supervise/rank_environment.py`). But some code puts the folder of its project
before it at import (`sys.path.insert(0, os.getcwd())`, rootutils); the current files would be imported then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

VARIABLE = "TRAINER_FROZEN_CODE"
"""Environment variable with the folders of the snapshot, in the format of PYTHONPATH."""


def install() -> None:
    """Search the snapshot before `sys.path` from now on. Does nothing the second time, and outside of a run."""
    folders = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    if not folders or any(isinstance(finder, FrozenFirst) for finder in sys.meta_path):
        return
    at = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
    sys.meta_path.insert(at, FrozenFirst(folders))


class FrozenFirst(MetaPathFinder):
    """Finds top-level modules and packages in the snapshot. Namespace packages are left to Python."""

    def __init__(self, folders: list[str]) -> None:
        self._folders = folders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module in the snapshot."""
        if path is not None or "." in fullname:
            return None
        spec = PathFinder.find_spec(fullname, self._folders)
        return spec if spec is not None and spec.origin is not None else None
