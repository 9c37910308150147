"""Ask W&B's server what it has of a run: `python -m trainer.tracking.accepted RUN_DIR [SEGMENT...]`.

A process of its own, because it imports wandb. Prints the record `Accepted`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.core import records
from trainer.runs.directory import RunDirectory
from trainer.runs.records import WandbRun
from trainer.tracking.upload import Accepted, is_uploaded, segments_of
from trainer.tracking.wandb_segment import last_row

_PATIENCE_S = 30.0
"""Seconds in which a server may still be storing what it has accepted."""


def main() -> None:
    """Print the answer, and record the entity and the URL of the W&B run."""
    import wandb

    run = RunDirectory(Path(sys.argv[1]))
    known = run.wandb() or WandbRun(id=run.id)
    counted = {path for path in segments_of(run) if is_uploaded(path)} | set(map(Path, sys.argv[2:]))
    rows = sum(number + 1 for path in counted if (number := last_row(path)) is not None)
    api = wandb.Api(timeout=20)
    path = "/".join((known.entity or api.default_entity or "", known.project or "", known.id))
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        served: Any = api.run(path)
        count = int(served.lastHistoryStep) + 1
        if count >= rows or time.monotonic() > deadline:
            break
        time.sleep(2)
    run.write_wandb(replace(known, entity=path.split("/")[0], url=served.url))
    print(records.dumps(Accepted(rows=rows, served=count, url=served.url)))


if __name__ == "__main__":
    main()
