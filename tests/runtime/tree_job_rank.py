"""One of four ranks that train whole jobs, over a tree of pairs or fully connected; for `test_tree_jobs.py`.

`python tree_job_rank.py tree|mesh RUNS.json`: a list of run directories. Each is trained, and rank 0 of a tree writes
how often it was used into `reductions.json` of the run.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from trainer.runtime import cpu_groups, torch_setup
from trainer.train.run import run


def _nothing(*_: Any, **__: Any) -> None:
    pass


def main() -> None:
    warnings.filterwarnings("ignore")
    counted: list[str] = []
    if sys.argv[1] == "tree":
        os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
        cpu_groups.FULL_MESH_UP_TO = torch_setup.FULL_MESH_UP_TO = 1
        cpu_groups.FAN_OUT = 2
        for name in ("reduce", "gather"):
            original = getattr(cpu_groups._Tree, name)

            def counting(tree: Any, *arguments: Any, name: str = name, original: Any = original) -> Any:
                counted.append(name)
                return original(tree, *arguments)

            setattr(cpu_groups._Tree, name, counting)
    # One group for all of the runs: a second one on the same store does not reliably come about.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.distributed.init_process_group = torch.distributed.destroy_process_group = _nothing  # type: ignore[assignment]
    for path in json.loads(Path(sys.argv[2]).read_text()):
        print(f"--- {path}", flush=True)
        counted.clear()
        assert run(Path(path)) == 0, path
        torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            found = {name: counted.count(name) for name in ("reduce", "gather")}
            (Path(path) / "reductions.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # a thread of each tree still waits for work


if __name__ == "__main__":
    main()
