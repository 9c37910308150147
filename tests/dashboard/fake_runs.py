"""Run directories as trainings leave them, made without training."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import yaml

from trainer.core import processes
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Launch, NodeUsage, Outcome
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.records import Parameter, Result, Spec, Trial

SPENT = {"import": 4.0, "start": 2.0, "build": 3.0, "train": 20.0, "data": 1.0, "validate": 2.0, "save": 1.0}
CONFIG: dict[str, Any] = {
    "name": "digits",
    "seed": 1,
    "runs_dir": "runs",
    "trainer": {"max_steps": 1000, "precision": "bf16-mixed"},
    "tracking": {"name": "none"},
    "strategy": {"name": "ddp"},
    "cluster": {"name": "local"},
    "model": {"_target_": "trainer.models.mlp.MLP", "width": 64},
    "optimizer": {"lr": 0.001},
    "data": {"batch_size": 64},
}


def make_run(
    folder: Path,
    name: str = "digits",
    *,
    outcome: Outcome | None = "finished",
    steps: int = 1000,
    every: int = 10,
    ago_s: float = 1000.0,
    reason: str = "",
    metrics: dict[str, Any] | None = None,
    **config: Any,
) -> RunDirectory:
    """Make a run.

    Args:
        folder: The folder of runs.
        name: Its name.
        outcome: How its attempt ended; None: this process is said to train it.
        steps: Completed steps.
        every: Steps between two lines of metrics.
        ago_s: When it was created.
        reason: Why it ended.
        metrics: Metrics of every line beside the loss.
        config: Values by dotted key, with `__` for the dot.
    """
    run = RunDirectory.new(folder, name)
    created = time.time() - ago_s
    values: dict[str, Any] = json.loads(json.dumps({**CONFIG, "name": name}))
    for key, value in config.items():
        *sections, last = key.split("__")
        section = values
        for one in sections:
            section = section.setdefault(one, {})
        section[last] = value
    run.config_path.write_text(yaml.safe_dump(values))
    manifest = {"id": run.id, "choices": {"model": "mlp"}, "user": "ada", "host": "node1", "python": "3.11"}
    run.manifest_path.write_text(json.dumps({**manifest, "created": created}))
    run.overrides_path.write_text(f"name={name}\n")
    write_metrics(run, steps, every, created, float(values["optimizer"]["lr"]), metrics or {})
    run.add_event(events.Created(time=created, overrides=[f"name={name}"]))
    run.add_event(events.Started(time=created + 9, attempt=0, step=0, world_size=2, host="node1"))
    run.add_event(events.CheckpointSaved(time=created + 30, attempt=0, step=steps // 2, bytes=10**6))
    run.attempt_logs(0).mkdir(parents=True)
    run.rank_log(0, 0).write_text("".join(f"step {step}/{steps}  loss {1 / step:.4f}\n" for step in range(1, 200)))
    alive = outcome is None
    pid = os.getpid() if alive else 1
    host = socket.gethostname() if alive else "elsewhere"
    boot_id = processes.boot_id() if alive else "another"
    started = processes.started_ticks(pid) if alive else 1
    run.write_launch(Launch(cluster="local", host=host, boot_id=boot_id, pid=pid, pid_started=started))
    beat = HeartbeatRecord(
        time=created + 40, step=steps, pid=pid, host="node1", device="cpu", phase=outcome or "train", began=created + 1,
        spent=SPENT, batch_s=0.02, own_s=0.01, rate=640.0, rate_unit="samples/s", eta_s=60.0,
    )  # fmt: skip
    run.write_heartbeat(0, beat)
    joules = {"gpu": {"train": 60_000.0}, "cpu": {"train": 4000.0}}
    usage = NodeUsage(
        attempt=0, node=0, host="node1", device="gpu", devices=2, measured=2, began=created, seconds=40.0, joules=joules
    )
    run.write_usage(usage)
    if outcome:
        ended = AttemptOutcome(attempt=0, outcome=outcome, step=steps, time=created + 45, reason=reason, host="node1")
        run.write_outcome(ended)
    os.utime(run.config_path, (created, created))
    return run


def write_metrics(run: RunDirectory, steps: int, every: int, start: float, lr: float, more: dict[str, Any]) -> None:
    """Write a loss that falls by the learning rate, and a validation at every tenth line."""
    lines = []
    for step in range(every, steps + 1, every):
        loss = 2.3 * math.exp(-step * lr) + 0.3 + 0.05 * math.sin(step)
        at = round(start + 10 + step / 50, 3)
        line = {"step": step, "epoch": step // 400, "time": at, "train/loss": loss, **more}
        if step % (10 * every) == 0:
            line |= {"val/acc": 1 - loss / 3}
        lines.append(json.dumps(line))
    run.metrics_path.write_text("\n".join(lines) + "\n")


def make_sweep(folder: Path, paths: list[Path]) -> SweepDirectory:
    """Make a sweep beside the runs: of its ten trials, eight have ended, in the first eight of `paths`."""
    made = SweepDirectory.new(folder.parent / "sweeps", "search")
    keys = ("optimizer.lr", "+model.depth")
    space = [Parameter(key=keys[0], kind="float", low=1e-4, high=1.0, log=True)]
    space.append(Parameter(key=keys[1], kind="choice", choices=["2", "4"]))
    spec = Spec(
        revision=0, id=made.id, name="search", command=[], fixed=[], parameters=space, method="random", trials=10,
        metric=["val/acc"], direction=["maximize"], cwd="/", runs_dir=str(folder),
    )  # fmt: skip
    made.write_spec(spec)
    values = [{keys[0]: str(10 ** (number / 4 - 3)), keys[1]: str(2 + 2 * (number % 2))} for number in range(10)]
    made.add_trials([Trial(number=number, values=one, overrides=[]) for number, one in enumerate(values)])
    for number in range(8):
        result = Result(state="finished", values=[0.8 + number / 100], step=9, run=str(paths[number]), time=1e9)
        made.add_result(number, 0, result)
    return made
