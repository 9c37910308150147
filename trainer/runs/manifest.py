"""Build `manifest.json`: versions, code, data and machine of a run, to compare and to reproduce it."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import time
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.core.gpus import inventory
from trainer.core.hardware import usable_cores
from trainer.runs.code_snapshot import Snapshot
from trainer.runs.data_files import data_files
from trainer.runs.packages import installed

SCHEMA_VERSION = 1
_PACKAGES = ("trainer", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "deepspeed", "numpy")


def manifest_of(choices: dict[str, str], code: Snapshot, data: Any = None, cwd: Path | None = None) -> dict[str, Any]:
    """Return the manifest as plain data. No package is imported.

    Args:
        choices: Configuration group to the chosen option.
        code: The snapshot of the code.
        data: The section `data` of the configuration.
        cwd: Folder that relative paths refer to; None: the working directory.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.time(),
        "user": _user(),
        **environment(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "choices": choices,
        "python_hash_seed": os.environ.get("PYTHONHASHSEED") or "0",
        "code": asdict(code),
        "data": data_files(data, cwd or Path.cwd()),
    }


def environment() -> dict[str, Any]:
    """Return the Python, the packages and the machine of this process, as in the manifest."""
    gpus = inventory()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": gpus.most,
        "machine": {"cpu": _cpu(), "cores": usable_cores(), "gpus": [gpu.name for gpu in gpus.gpus]},
        "installed": _installed(),
    }


@cache
def _installed() -> dict[str, dict[str, str]]:
    """Return the packages on `sys.path`, which the jobs of a sweep have in common."""
    return installed()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container without an entry in /etc/passwd
        return None


def _cpu() -> str:
    """Return the model of the processor, or its architecture where Linux does not name the model."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
