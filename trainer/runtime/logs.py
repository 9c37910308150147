"""What `logging` writes into a rank's log: the user's own messages from INFO on, of libraries warnings and worse."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
"""Hydra's, of its job's log."""
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_STANDARD_LIBRARY = os.path.dirname(logging.__file__).rpartition(os.sep)[0] + os.sep
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class _OfUsers(logging.Filter):
    """Lets warnings through, and less of what is not an installed library's."""

    def __init__(self, packages: Iterable[str]) -> None:
        """`packages`: installed ones that are the user's all the same: the configuration names them."""
        super().__init__()
        self._packages = frozenset(packages)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING or record.name.partition(".")[0] in self._packages:
            return True
        path = record.pathname
        return not (any(part in path for part in _INSTALLED) or path.startswith((_STANDARD_LIBRARY, _OURS)))


def start(config: dict[str, Any]) -> None:
    """Give the root logger a handler on stderr, which is the rank's log, unless it has one.

    `rank_zero_info` and `rank_zero_warn` come through it, too, with the file of their caller. Loggers that the user
    sets to a level keep it.
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
        # They have handlers of their own, given while the root had none: everything would come twice.
        logger = logging.getLogger(name)
        for own in list(logger.handlers):
            logger.removeHandler(own)
        logger.propagate = True
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)


def _packages_of(node: Any) -> set[str]:
    """The top packages of the `_target_`s in a configuration, without those that everybody's comes from."""
    found: set[str] = set()
    if isinstance(node, dict):
        target = node.get("_target_")
        if isinstance(target, str):
            found.add(target.partition(".")[0])
        node = list(node.values())
    for one in node if isinstance(node, list) else []:
        found |= _packages_of(one)
    return found - {"trainer", "torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "timm"}
