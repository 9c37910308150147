"""Import torch and Lightning faster: 2.8 s of CPU instead of 4.8 s, which is most of the start of a short job.

It is done once for all ranks of a node if they are forked (`trainer/supervise/agent.py`).
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from trainer.runtime import frozen, namespaces


@contextmanager
def quick_imports() -> Iterator[None]:
    """Wrap the first import of torch and Lightning in a process. It also gives Lightning's packages one identity.

    The garbage collector is off meanwhile, and ignores the objects of the modules later (1 s). And torchmetrics, which
    Lightning imports, does not import scipy.signal (1 s), to which it would only add a name for the package srmrpy:
    https://github.com/Lightning-AI/torchmetrics/blob/v1.9.0/src/torchmetrics/__init__.py#L30
    """
    frozen.install()
    namespaces.install()
    gc.disable()
    try:
        with _modules_of_frames_by_name():
            _import_torchmetrics()
            yield
        _read_entry_points_once()
    finally:
        gc.freeze()
        gc.enable()


def _import_torchmetrics() -> None:
    if "scipy.signal" in sys.modules or find_spec("scipy") is None:
        return
    stand_in = ModuleType("scipy.signal")
    stand_in.hamming = None  # type: ignore[attr-defined]
    sys.modules[stand_in.__name__] = stand_in
    try:
        import torchmetrics  # noqa: F401
    finally:
        del sys.modules[stand_in.__name__]


@contextmanager
def _modules_of_frames_by_name() -> Iterator[None]:
    """Let inspect find the module of a frame by its name instead of its file.

    torch asks for it at each operator that it registers, and inspect then resolves the paths of all new modules: 30,000
    calls of the file system.
    """
    by_file = inspect.getmodule

    @functools.wraps(by_file)
    def getmodule(object: Any, _filename: str | None = None) -> ModuleType | None:
        if inspect.isframe(object):
            return sys.modules.get(object.f_globals.get("__name__", ""))
        return by_file(object, _filename)

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = by_file


def _read_entry_points_once() -> None:
    """Read now what Lightning's Trainer reads in each rank: a file of each installed package, for their callbacks."""
    registry: Any = sys.modules.get("lightning.fabric.utilities.registry")
    if registry is not None and hasattr(registry, "entry_points"):
        registry.entry_points = functools.cache(registry.entry_points)
        registry.entry_points(group="lightning.pytorch.callbacks_factory")
