"""One of four ranks that start each run of a list, and measure the memory until the model is sharded.

`python deferred_rank.py JOBS.json`: {name: RUN DIRECTORY}. Rank 0 writes {name: results} into `started.json` beside it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.runs.directory import RunDirectory
from trainer.runtime.stop import Request, StopTraining
from trainer.strategies.fsdp import RunFSDPStrategy
from trainer.strategies.saving import gathered, model_tensors
from trainer.train.run import run

SMALL_BYTES = 2**14
TRAINED = ("fsdp", "own")
"""The others end when the model is sharded: a step takes as long as the start, and has its tests elsewhere."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of host memory that tensors hold at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result) if self.counts else ():
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() < SMALL_BYTES or storage._cdata in self.live:
            return
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))


def _nothing(*_: Any, **__: Any) -> None:
    pass


def main() -> None:
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.distributed.init_process_group = torch.distributed.destroy_process_group = _nothing  # type: ignore[assignment]
    set_up, results = RunFSDPStrategy.setup, {}
    for name, path in jobs.items():
        print(f"--- {name}", flush=True)
        mode = LiveBytes()

        def setup(strategy: RunFSDPStrategy, trainer: Any, mode: LiveBytes = mode, name: str = name) -> None:
            set_up(strategy, trainer)
            mode.counts = False
            module = strategy.lightning_module
            peaks: list[Any] = [None] * strategy.world_size
            torch.distributed.all_gather_object(peaks, mode.peak, group=strategy._group())
            tensors = model_tensors(module)
            if strategy.global_rank:
                tensors = {key: one for key, one in tensors.items() if isinstance(one, DTensor)}
            weights = gathered(tensors, strategy._group())
            assert not any(parameter.is_meta for parameter in module.parameters())
            if strategy.is_global_zero:
                results[name] = {
                    "peak": max(peaks),
                    "trained": [n for n, p in module.named_parameters() if p.requires_grad],
                }
                torch.save(weights, Path(sys.argv[1]).parent / f"{name}.pt")
            if name not in TRAINED:
                raise StopTraining(Request.STOP)

        RunFSDPStrategy.setup = setup  # type: ignore[method-assign]
        with mode:
            assert run(RunDirectory(Path(path)).path) == 0, name
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]).parent / "started.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
