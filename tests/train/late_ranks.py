"""Two ranks that train, resume and evaluate each run of a list, started by `fork_ranks.py`.

`python late_ranks.py JOBS.json`: a list of {"first": RUN, "second": RUN}; the second resumes from the first's
checkpoint. Rank 0 writes the metrics of the second's evaluation into `evaluated.json` beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from trainer.checkpoint.store import CheckpointStore
from trainer.export.run import export
from trainer.runs.directory import RunDirectory
from trainer.train.evaluate import evaluate
from trainer.train.run import run

EXPORTED = ("setup_single",)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def main() -> None:
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    # One group for all of the runs: a second one on the same store does not reliably come about.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.distributed.init_process_group = torch.distributed.destroy_process_group = _nothing  # type: ignore[assignment]
    for name, paths in jobs.items():
        print(f"--- {name}", flush=True)
        first, directory = (RunDirectory(Path(path)) for path in paths)
        assert run(first.path) == 0, name
        torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            shutil.copytree(first.checkpoints_dir, directory.checkpoints_dir, dirs_exist_ok=True)
        torch.distributed.barrier()
        assert run(directory.path) == 0, name
        newest = max(CheckpointStore(directory.checkpoints_dir).committed(), key=lambda one: one.step)
        found[name] = evaluate(directory, newest.path, "val")
        if name in EXPORTED:
            folder = directory.path / "onnx"
            folder.mkdir()
            found[name]["onnx"] = export(directory, newest, "onnx", folder).largest_difference
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]).parent / "evaluated.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
