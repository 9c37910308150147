"""Configure `logging` for the log of a rank: messages of the user from INFO, of libraries from WARNING."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
"""The format of Hydra's job log."""
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_STANDARD_LIBRARY = os.path.dirname(logging.__file__).rpartition(os.sep)[0] + os.sep
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class _OfUsers(logging.Filter):
    """Passes warnings, and lower levels from loggers outside installed libraries.

    Args:
        packages: Installed packages that count as the user's, because the configuration names them.
    """

    def __init__(self, packages: Iterable[str]) -> None:
        super().__init__()
        self._packages = frozenset(packages)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write the record."""
        if record.levelno >= logging.WARNING or record.name.partition(".")[0] in self._packages:
            return True
        path = record.pathname
        return not (any(part in path for part in _INSTALLED) or path.startswith((_STANDARD_LIBRARY, _OURS)))


def start(config: dict[str, Any]) -> None:
    """Give the root logger a handler on stderr, which is the log of the rank, unless it has one.

    `rank_zero_info` and `rank_zero_warn` use it as well, with the file of their caller. Loggers keep a level that the
    user sets.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_OfUsers(_packages_of(config)))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in [one for one in logging.root.manager.loggerDict if one.partition(".")[0] in _LIGHTNING]:
        # Their own handlers, added while the root logger had none, would write each message twice.
        logger = logging.getLogger(name)
        for own in list(logger.handlers):
            logger.removeHandler(own)
        logger.propagate = True
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)


def _packages_of(node: Any) -> set[str]:
    """Return the top-level packages of the `_target_`s in a configuration, without the usual libraries."""
    packages: set[str] = set()
    if isinstance(node, dict):
        target = node.get("_target_")
        if isinstance(target, str):
            packages.add(target.partition(".")[0])
        node = list(node.values())
    for one in node if isinstance(node, list) else []:
        packages |= _packages_of(one)
    return packages - {"trainer", "torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "timm"}
