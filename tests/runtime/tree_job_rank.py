"""One of four ranks that train a job, over a tree of pairs or fully connected; for `test_tree_jobs.py`.

`python tree_job_rank.py tree|mesh RUN`: rank 0 writes how often the tree was used into `reductions.json` of the run.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from trainer.runtime import cpu_groups, torch_setup
from trainer.train.run import run


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
    path = Path(sys.argv[2])
    assert run(path) == 0
    if os.environ["RANK"] == "0":
        found = {name: counted.count(name) for name in ("reduce", "gather")}
        (path / "reductions.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # a thread of each tree still waits for work


if __name__ == "__main__":
    main()
