"""Build `manifest.json`: versions, code and machine of a run, to reproduce it."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

from trainer.runs.code_snapshot import Snapshot

SCHEMA_VERSION = 1
_PACKAGES = ("trainer", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "deepspeed", "numpy")


def manifest_of(choices: dict[str, str], code: Snapshot) -> dict[str, Any]:
    """Return the manifest as plain data. Versions are from the metadata of installed packages; nothing is imported."""
    from trainer.core.hardware import count_gpus

    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.time(),
        "host": socket.gethostname(),
        "user": _user(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": count_gpus(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "choices": choices,
        "python_hash_seed": os.environ.get("PYTHONHASHSEED") or "0",
        "code": asdict(code),
    }


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
