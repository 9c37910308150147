"""A rank whose GPU is a stand-in: `gpu_metrics_rank.py FOLDER`, started by `fork_ranks.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from trainer.callbacks.gpu_metrics import GpuMetrics
from trainer.callbacks.metrics import BatchWork, TrainMetrics
from trainer.callbacks.node_metrics import NodeMetrics
from trainer.runtime.gpu_load import GpuLoad, Load
from trainer.runtime.process import Rank

LOADS = (Load(90.0, 600.0), Load(None, 500.0), Load(30.0, None))
"""By rank: all, as a MIG instance, without power."""


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    memory: Any = torch.cuda
    memory.max_memory_allocated = lambda device: (70 + rank) * 1e9
    memory.max_memory_reserved = lambda device: (90 - rank) * 1e9
    load = GpuLoad(lambda: LOADS[rank])
    load.sample()
    gpus = GpuMetrics(torch.device("cuda", 0), load)
    heartbeat: Any = None
    memory.memory_reserved = lambda device: (80 - rank) * 1e9
    nodes = NodeMetrics(Rank(rank, 0, 3, 1, 0), torch.device("cuda", 0), root=Path(sys.argv[1]))
    metrics = TrainMetrics(1, BatchWork(1), None, heartbeat, group, gpus=gpus, nodes=nodes)
    metrics._sums, metrics._counts = {"loss": torch.tensor(2.0 * rank)}, {"loss": 2}
    (Path(sys.argv[1]) / f"found-{rank}.json").write_text(json.dumps(metrics._reduced()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
