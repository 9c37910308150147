"""Abort NCCL after an exception, so that this rank can exit.

A rank that fails leaves collectives on its GPU which the other ranks never join. Whatever then waits for the GPU
(freeing memory, ending the process) would wait for the timeout of the collectives, 1,800 s by default. Gloo groups are
left alone: nothing on them waits for a device, and the checkpoint that is being written may use one.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Longest wait for NCCL, whose abort may itself wait for a communicator that is stuck."""


def abort_nccl(timeout_s: float = TIMEOUT_S) -> bool:
    """Abort the NCCL communicators of all process groups of this rank; harmless if there are none.

    Does not import torch. `torch.distributed` has no public function that leaves other backends alone: its
    `_abort_process_group` (torch 2.11 to 2.13) aborts gloo, too. The order and the group semantics are those of that
    function; without them the aborts of two communicators can wait for each other
    (https://github.com/pytorch/pytorch/issues/119797).

    Args:
        timeout_s: Longest time to wait.

    Returns:
        False if the abort failed or has not returned in time.
    """
    backends = _nccl_backends()
    if not backends:
        return True
    problems: list[BaseException] = []

    def abort() -> None:
        try:
            backends[0]._group_start()
            for backend in backends:
                backend.abort()
            backends[0]._group_end()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=abort, name="abort-nccl", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if problems:
        log.warning("NCCL could not be aborted: %s", problems[0])
    elif thread.is_alive():
        log.warning("NCCL was not aborted within %g s; the exit does not wait for it", timeout_s)
    return not problems and not thread.is_alive()


def _nccl_backends() -> list[Any]:
    """Return the NCCL backends of all process groups, the newest group first."""
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None or not c10d.is_initialized() or not c10d.is_nccl_available():
        return []
    names: dict[Any, str] = c10d._world.pg_names
    device = sys.modules["torch"].device("cuda")
    backends = []
    for group in sorted(names, key=names.__getitem__, reverse=True):
        try:
            backend = group._get_backend(device)
        except (RuntimeError, ValueError):  # a group without a backend for CUDA
            continue
        if isinstance(backend, c10d.ProcessGroupNCCL):
            backends.append(backend)
    return backends
