"""Write the flight recorder of torch (the latest collectives) on request of the node process, and set timeouts.

torch records the last 2,000 collectives of NCCL and of gloo (`TORCH_FR_BUFFER_SIZE`,
`TORCH_NCCL_TRACE_BUFFER_SIZE` before torch 2.9).
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

from trainer.config.schema import ResilienceOptions
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.node_folder import NodeFolder
from trainer.runtime.process import Rank

MARGIN_S = 60.0
"""Time in which the node process detects a hang, collects evidence and kills the workers."""
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Functions of torch._C._distributed_c10d: for gloo, and for builds with NCCL."""


class FlightRecorder:
    """Writes `logs/attempt-NN/rank-R.collectives.json` on request.

    The heartbeat thread calls `check`, which works while the main thread waits in a collective.
    """

    def __init__(self, directory: RunDirectory, rank: Rank) -> None:
        self._request = (NodeFolder.of_this_rank() or directory).collectives_request(rank.attempt)
        self._trace = directory.collectives_trace(rank.attempt, rank.rank)

    def check(self) -> None:
        """Write the trace if it is requested."""
        try:
            if self._request.exists() and not self._trace.exists():
                write_trace(self._trace)
        except OSError:  # of the file system; the next beat tries again
            return


def write_trace(path: Path) -> None:
    """Write `{"entries": [...]}`: the collectives of all backends in the format of torch, oldest first."""
    entries: list[dict[str, Any]] = []
    for name in _DUMPS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
    entries.sort(key=lambda entry: entry.get("time_created_ns", 0))
    write_atomic(path, json.dumps({"entries": entries}))


class Timeouts:
    """Timeouts of collectives.

    Until the end of the first step the timeout is longer than the limit of hang detection for start and compilation,
    because hang detection can name the rank. Then it is `resilience.collective_timeout_s`.
    """

    def __init__(self, options: ResilienceOptions) -> None:
        self.then_s = self.first_s = options.collective_timeout_s
        if options.hang_factor:
            self.first_s = max(self.then_s, max(options.hang_slow_s, options.hang_after_s) + MARGIN_S)

    def on_train_start(self) -> None:
        """Set the first timeout: the process groups of the device mesh have the default of torch."""
        set_timeout(self.first_s)

    def on_first_step(self) -> None:
        """Set the timeout for the rest of the training."""
        set_timeout(self.then_s)


def set_timeout(timeout_s: float) -> None:
    """Set the timeout of all later collectives of this rank, in all its process groups."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
