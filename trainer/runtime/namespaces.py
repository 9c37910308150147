"""Make `pytorch_lightning` an alias of `lightning.pytorch`, so that a process has one Lightning.

Both packages are installed (`lightning` requires the other), as two copies of the same source. A LightningModule of one
is not a LightningModule for the Trainer of the other, and so for callbacks, data modules and loggers. An import hook
gives both names to one module, so that any mixture trains unchanged. Pickles and configurations that contain
`pytorch_lightning.x.y` can be read as well.

Call `install` before the first import of Lightning and of the user's code. It imports nothing itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

from trainer.config.namespaces import TWINS, canonical

OUTSIDE = ("__about__", "__version__")
"""Modules of `pytorch_lightning` and `lightning_fabric` that are at the top level of `lightning`."""


def install() -> None:
    """Make both names of Lightning one package from now on. Does nothing the second time.

    Modules of `pytorch_lightning` that are already imported are removed, so that the next import finds the one package.
    """
    if any(isinstance(finder, OneLightning) for finder in sys.meta_path):
        return
    for name in [name for name in sys.modules if name.partition(".")[0] in TWINS]:
        del sys.modules[name]
    sys.meta_path.insert(0, OneLightning())


class OneLightning(MetaPathFinder):
    """Finds `pytorch_lightning[.x.y]` and `lightning_fabric[.x.y]` in `lightning`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that loads the module of `lightning`."""
        top, _, rest = fullname.partition(".")
        if top not in TWINS:
            return None
        name = canonical(fullname)
        if not rest:  # find_spec alone must not import it
            located = PathFinder.find_spec(name, _folders("lightning"))
            return located and ModuleSpec(fullname, _Same(name), origin=located.origin, is_package=True)
        if name not in sys.modules:
            located = find_spec(name)
            if located is None:
                return None
            return ModuleSpec(fullname, _Same(name), is_package=located.submodule_search_locations is not None)
        return ModuleSpec(fullname, _Same(name), is_package=hasattr(sys.modules[name], "__path__"))


def _folders(package: str) -> list[str]:
    located = find_spec(package)
    return list(located.submodule_search_locations or ()) if located else []


class _Same(Loader):
    """Loads a module by importing it under its other name.

    Args:
        name: The name in `lightning`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the other name."""
        module = import_module(self.name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec, which importlib has replaced. The module itself is executed already."""
        module.__spec__ = self._spec
        for alias, name in TWINS.items():
            if self.name == name:
                for inner in OUTSIDE:
                    sys.modules[f"{alias}.{inner}"] = import_module(f"lightning.{inner}")
                # keeps logging.getLogger("pytorch_lightning").setLevel() and .info() working
                logging.getLogger(alias).parent = logging.getLogger(name)
