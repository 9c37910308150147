"""Has a process that composes many jobs load each choice of the shipped groups once: most tests compose the same few.

Loading is more than half of a composition. A choice is loaded by Hydra when it first comes; later ones get a copy. Jobs
with a search path of their own, or with options of Hydra itself, are loaded each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from trainer.config.files import ConfigLoader
from trainer.config.primary import copier

_SHIPPED = {"hydra", "main", "schema"}
"""Providers of the search path of a job without configs of its own."""

_load = ConfigLoader.load_configuration
_copiers: dict[tuple[Any, ...], Callable[[], Any]] = {}


def load_once() -> None:
    """From now on, in this process."""
    ConfigLoader.load_configuration = _loaded  # type: ignore[method-assign]


def _loaded(self: ConfigLoader, config_name: str, overrides: list[str], run_mode: Any) -> Any:
    path = [(one.provider, one.path) for one in self.config_search_path.get_path()]
    if {provider for provider, _ in path} != _SHIPPED or any("hydra" in one for one in overrides):
        return _load(self, config_name, overrides, run_mode)
    key = (*path, config_name, *overrides, run_mode)
    if key not in _copiers:
        _copiers[key] = copier(_load(self, config_name, overrides, run_mode))
    tree = _copiers[key]()
    tree.hydra.runtime.cwd = os.getcwd()
    return tree
