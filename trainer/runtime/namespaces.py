"""One Lightning in the process: `import pytorch_lightning` gives the very modules of `lightning.pytorch`.

Both packages are installed (`lightning` requires the other), as two copies of the same source. A user's LightningModule
on the one is not a LightningModule to a Trainer of the other, nor are callbacks, data modules and loggers. An import
hook gives both names to one module, so that there is one class of each name and any mixture trains as it is. Pickles
and configurations that name `pytorch_lightning.x.y` are read with it, too.

`install` belongs before the first import of Lightning and of anything of the user's. It imports nothing itself.
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
"""Modules of `pytorch_lightning` and `lightning_fabric` that `lightning` has once, at its top."""


def install() -> None:
    """Have both names of Lightning mean one package from now on; does nothing the second time.

    What was imported of `pytorch_lightning` before is forgotten, so that whoever imports it next gets the one package.
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
        top, _, rest = fullname.partition(".")
        if top not in TWINS:
            return None
        name = canonical(fullname)
        if not rest:  # who only asks whether it is there must not pay for its import
            found = PathFinder.find_spec(name, _folders("lightning"))
            return found and ModuleSpec(fullname, _Same(name), origin=found.origin, is_package=True)
        if name not in sys.modules:
            found = find_spec(name)
            if found is None:
                return None
            return ModuleSpec(fullname, _Same(name), is_package=found.submodule_search_locations is not None)
        return ModuleSpec(fullname, _Same(name), is_package=hasattr(sys.modules[name], "__path__"))


def _folders(package: str) -> list[str]:
    found = find_spec(package)
    return list(found.submodule_search_locations or ()) if found else []


class _Same(Loader):
    """Loads a module by importing it under its other name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute: it has been. importlib has put the other name's spec into it."""
        module.__spec__ = self._spec
        for alias, name in TWINS.items():
            if self.name == name:
                for inner in OUTSIDE:
                    sys.modules[f"{alias}.{inner}"] = import_module(f"lightning.{inner}")
                # logging.getLogger("pytorch_lightning").setLevel() and .info() do what they did
                logging.getLogger(alias).parent = logging.getLogger(name)
