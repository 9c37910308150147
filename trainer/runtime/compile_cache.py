"""A folder for what torch.compile makes, which outlives the run: a requeued or restarted job need not compile again."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import torch

from trainer.core.errors import UserError
from trainer.core.paths import cache_root

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_log = logging.getLogger(__name__)


def use_compile_cache() -> Path | None:
    """Let torch.compile keep its results in a private folder of this user, and return the folder.

    torch's default is a folder in /tmp, which a job on another node does not see. The folder holds code that ranks load
    and run, so nobody else may write to it. `TORCHINDUCTOR_CACHE_DIR`, if set, is left as it is.

    Returns:
        The folder; None if torch's default remains, because this one cannot be made.

    Raises:
        UserError: The folder belongs to somebody else.
    """
    given = os.environ.get(_VARIABLE)
    if given:
        return Path(given)
    folder = cache_root() / "compile" / f"torch-{torch.__version__}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            problem = f"{folder} is not a folder of this user: code that torch.compile keeps there would be run"
            raise UserError(problem, f"remove it, or set {_VARIABLE} to a folder of yours")
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        _log.warning("torch.compile keeps its results in torch's own folder: %s", error)
        return None
    os.environ[_VARIABLE] = str(folder)
    return folder
