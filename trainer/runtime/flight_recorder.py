"""What this rank has asked the others for: torch's flight recorder, written when the node process asks, and timeouts.

torch keeps the last 2,000 collectives of NCCL and of gloo by itself (`TORCH_FR_BUFFER_SIZE`,
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
from trainer.runtime.process import Rank

MARGIN_S = 60.0
"""In which the watch notices, collects its evidence and kills."""
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Of torch._C._distributed_c10d: gloo's, and that of a build with NCCL."""


class FlightRecorder:
    """Writes `logs/attempt-NN/rank-R.collectives.json` once it is asked; `look` is called by the heartbeat's thread,
    which goes on while the main thread waits in a collective."""

    def __init__(self, directory: RunDirectory, rank: Rank) -> None:
        self._request = directory.collectives_request(rank.attempt)
        self._trace = directory.collectives_trace(rank.attempt, rank.rank)

    def look(self) -> None:
        try:
            if self._request.exists() and not self._trace.exists():
                write_trace(self._trace)
        except OSError:  # of the file system; it is asked again in a second
            return


def write_trace(path: Path) -> None:
    """`{"entries": [...]}` as torch gives them, of all libraries, oldest first."""
    entries: list[dict[str, Any]] = []
    for name in _DUMPS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", [])
    entries.sort(key=lambda entry: entry.get("time_created_ns", 0))
    write_atomic(path, json.dumps({"entries": entries}))


class Timeouts:
    """How long a collective may take: until the first step is done as long as the watch for hangs allows start-up and
    compilation, for that can say who it is; then `resilience.collective_timeout_s`."""

    def __init__(self, options: ResilienceOptions) -> None:
        self.then_s = self.first_s = options.collective_timeout_s
        if options.hang_factor:
            self.first_s = max(self.then_s, max(options.hang_slow_s, options.hang_after_s) + MARGIN_S)

    def on_train_start(self) -> None:
        """The groups of the strategy's mesh have been made with torch's own limit."""
        set_timeout(self.first_s)

    def on_first_step(self) -> None:
        set_timeout(self.then_s)


def set_timeout(timeout_s: float) -> None:
    """Of every collective that this rank begins from now on, in every group that it is in."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
