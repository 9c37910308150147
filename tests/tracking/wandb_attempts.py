"""Forks attempts that log to W&B from one process that has imported its client, which would be most of what each takes.

It reads a line of JSON for each attempt from its standard input. The exit code comes in a file.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from trainer.config.schema import TrackingOptions
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.metrics_lines import rewind
from trainer.tracking import weights_and_biases

IMPORTED = ("wandb", "wandb.apis.public", "wandb.sdk.launch.inputs.internal", "requests")


def attempt(run: RunDirectory, begin: int, end: int, dies: str) -> None:
    """Train from `begin` to `end`: a row a step, one more of the user's own, and at tens a validation."""
    step = begin
    rewind(run.metrics_path, begin)
    position = weights_and_biases.Position(begin, lambda: step)
    experiment = weights_and_biases.start(run, TrackingOptions(init_timeout_s=30), {"seed": 1}, position)
    with run.metrics_path.open("a") as file:
        for step in range(begin + 1, end + 1):
            line = {"loss": 1 / step}
            experiment.log({**line, "trainer/global_step": step})
            experiment.log({"own": -step})
            if step % 10 == 0:
                experiment.log({"acc": step / 100, "trainer/global_step": step})
                line["acc"] = step / 100
            file.write(json.dumps({"step": step, "time": time.time(), **line}) + "\n")
            file.flush()
            if step == end - 3 and dies == "slowly" and experiment.offline:
                time.sleep(1.2)  # all that was logged until now is in the file of the client
    seen, patience = run.path / "seen", time.monotonic() + 600
    while dies == "slowly" and not experiment.offline and not seen.exists() and time.monotonic() < patience:
        time.sleep(0.1)
    if dies:
        os.kill(os.getpid(), 9)
    weights_and_biases.finish(experiment, 0)


def become(job: dict[str, Any]) -> None:
    """Take the environment, the folder and the output of the job."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)


def main() -> None:
    """Fork until the standard input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    waiting: list[int] = []
    for line in sys.stdin:
        job = json.loads(line)
        waiting.append(os.fork())
        if waiting[-1] == 0:
            attempted = os.fork()
            if attempted == 0:
                become(job)
                attempt(RunDirectory(Path(job["run"])), job["begin"], job["end"], job["dies"])
                return
            _, status = os.waitpid(attempted, 0)
            write_atomic(Path(job["code"]), str(os.waitstatus_to_exitcode(status)))
            os._exit(0)
    for pid in waiting:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
