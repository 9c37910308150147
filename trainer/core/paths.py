"""Paths of the configs and the SLURM template that ship with this package, and of what is cached."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    """Return the folder inside the package (a wheel), or else next to the package (a checkout)."""
    inside = _PACKAGE / in_wheel
    return inside if inside.is_dir() else _PACKAGE.parent / in_checkout


def conf_dir() -> Path:
    """Return the folder of the Hydra config groups that ship with the package."""
    return _shipped("_conf", "conf")


def slurm_dir() -> Path:
    """Return the folder of the SLURM job script template."""
    return _shipped("_slurm", "slurm")


def cache_root() -> Path:
    """Return `$XDG_CACHE_HOME/trainer`, or `~/.cache/trainer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainer"
