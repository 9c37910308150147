"""Importing torch and Lightning is most of the start of a short job: 4.8 s of CPU, 2.8 s in here; once for all ranks of
a node, where they are forked (`trainer/supervise/agent.py`)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from trainer.runtime import frozen, namespaces


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around the first import of torch and Lightning in a process, which then has one Lightning under all its names.

    No garbage is looked for among what modules define (1 s), then or later. And scipy.signal is not imported (1 s) by
    torchmetrics, which Lightning imports, only to give it a name that the package srmrpy wants:
    https://github.com/Lightning-AI/torchmetrics/blob/v1.9.0/src/torchmetrics/__init__.py#L30
    """
    frozen.install()
    namespaces.install()
    gc.disable()
    try:
        _import_torchmetrics()
        yield
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
