#!/usr/bin/env python3
"""What `trainer ls` costs over 1,000 and 10,000 runs that ended: CPU time, and calls of the file system per run.

    .venv/bin/python benchmarks/ls.py             about a minute and 400 MB in a temporary folder
    .venv/bin/python benchmarks/ls.py --keep      also writes benchmarks/results/ls.md

A run is a copy of one that `RunDirectory` made, with 120 keys, 200 lines of metrics, two checkpoints and two ranks.
Counted are the opens, `stat`s and listings by path of the process, by replacing them in `os`; CPU time is that of the
whole command, the start of Python included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kept import keep

from trainer.checkpoint.commit import CommitInfo, write_checkpoint
from trainer.config.shape import LaunchShape
from trainer.runs import seal
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved, Ended, Started
from trainer.runs.facts import flat_config
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Launch
from trainer.runs.state import ended_state
from trainer.runs.summary import summary_in_state

COUNTS = (1000, 10000)
MOST_DERIVED = 2000
"""Of more runs the first list, which derives and seals each, is not measured."""
SECTIONS = ("model", "data", "optimizer", "scheduler", "trainer", "resilience")
GONE = 2**22 + 1
"""A process id that Linux does not use."""
COUNTER = """
import functools, json, os, sys
calls = 0
def counted(function):
    @functools.wraps(function)
    def call(*arguments, **named):
        global calls
        calls += 1
        return function(*arguments, **named)
    return call
from trainer.cli import main
for name in ("stat", "lstat", "open", "scandir", "listdir", "access"):
    setattr(os, name, counted(getattr(os, name)))
import builtins, io
builtins.open = io.open = counted(open)
main(["ls", "--runs-dir", sys.argv[1]])
print(calls, file=sys.stderr)
"""


def make_run(root: Path, number: int, lines: int = 200) -> RunDirectory:
    """A run that finished some time ago, as a run of two ranks on this machine leaves it."""
    run = RunDirectory.new(root, f"run{number}")
    config = {section: {f"option_{key}": key * number for key in range(20)} for section in SECTIONS}
    config["model"]["_target_"] = "trainer.models.mlp.MLP"
    config["trainer"]["max_steps"] = lines * 10
    named = {"strategy": {"name": "ddp"}, "cluster": {"name": "local"}, "tracking": {"name": "none", "tags": ["a"]}}
    run.config_path.write_text(json.dumps({"name": f"run{number}", "seed": number, **config, **named}))
    run.manifest_path.write_text(json.dumps({"schema_version": 1, "choices": {"model": "mlp", "data": "digits"}}))
    run.write_launch(
        Launch(cluster="local", shape=LaunchShape(1, 2, "cpu"), host=os.uname().nodename, pid=GONE, pid_started=1)
    )
    run.attempt_logs(0).mkdir(parents=True)
    run.add_event(Started(attempt=0, step=0, world_size=2))
    metrics = (
        {"step": step * 10, "train/loss": 1 / (step + number % 7), "val/acc": step / lines} for step in range(1, lines)
    )
    run.metrics_path.write_text("".join(json.dumps({"epoch": 0, "time": 0.0, **line}) + "\n" for line in metrics))
    for step in (lines * 5, lines * 10):
        info = CommitInfo(step, metrics={"val/acc": step / lines}, monitor="val/acc", monitor_value=step / lines)
        write_checkpoint(run.checkpoints_dir / f"step-{step:08d}", 0, info, 10, _write_state)
        run.add_event(CheckpointSaved(attempt=0, step=step, bytes=10))
    for rank in range(2):
        run.write_heartbeat(rank, HeartbeatRecord(time=time.time(), phase="finished", step=lines * 10))
    run.write_outcome(AttemptOutcome(attempt=0, outcome="finished", step=lines * 10))
    run.add_event(Ended(event="finished", attempt=0, step=lines * 10))
    return run


def _write_state(staging) -> None:  # noqa: ANN001
    with staging.file("state.pt") as file:
        file.write(b"0123456789")


def make_many(root: Path, count: int) -> None:
    """Copies of seven runs, each with a configuration of its own. Files that are not written again are linked."""
    templates = [make_run(root / "templates", number) for number in range(7)]
    for number in range(count):
        template = templates[number % len(templates)]
        target = root / "runs" / f"run{number}-{number:08d}"
        shutil.copytree(template.path, target, copy_function=os.link)
        config = json.loads(template.config_path.read_text())
        config["optimizer"]["option_3"] = number
        (target / "config.yaml").unlink()
        (target / "config.yaml").write_text(json.dumps(config))


def measure(root: Path, cache: Path) -> dict[str, str]:
    """CPU seconds and calls per run of the first list, of one that reads the seals, and of one that reads the cache."""
    runs, found = root / "runs", {}
    count = len(os.listdir(runs))
    if count <= MOST_DERIVED:
        found["first list, not sealed"] = _row(*_list(runs, cache), count)
    seal_all(runs)
    shutil.rmtree(cache, ignore_errors=True)
    found["sealed, no cache"] = _row(*_list(runs, cache), count)
    found["sealed and cached"] = _row(*min(_list(runs, cache) for _ in range(3)), count)
    return found


def seal_all(runs: Path) -> None:
    """Seal every run: one of each template by deriving its facts, and the copies with these."""
    derived: dict[int, seal.SealedSummary] = {}
    for path in sorted(runs.iterdir()):
        run, number = RunDirectory(path), int(path.name.rpartition("-")[2]) % 7
        sources = seal.signatures(run)
        if number not in derived:
            config = run.config()
            facts = summary_in_state(run, ended_state(run, run.launch()), config)
            flat = flat_config(run, config, run.manifest())
            derived[number] = seal.summary_of(run, facts, flat, sources, is_over=True)
        summary = derived[number]
        key = "optimizer.option_3"
        config = {**summary.config, key: int(path.name.rpartition("-")[2])}
        if not seal.write(run, replace(summary, folder=path.name, sources=sources, config=config)):
            raise SystemExit(f"{path} was not sealed")


def _list(runs: Path, cache: Path) -> tuple[float, int]:
    """CPU seconds and calls of one `trainer ls`."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", COUNTER, str(runs)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, int(done.stderr.splitlines()[-1])


def _row(cpu_s: float, calls: int, count: int) -> str:
    return f"{cpu_s:.2f} | {calls / count:.2f}"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", action="store_true", help="write results/ls.md")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of runs")
    options = parser.parse_args()
    lines = ["| runs | | CPU s | file calls per run |", "|---|---|---|---|"]
    print("\n".join(lines))
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            make_many(Path(folder), count)
            time.sleep(6)  # a reader seals what nobody has changed for five seconds
            for what, figures in measure(Path(folder), Path(folder) / "cache").items():
                lines.append(f"| {count:,} | {what} | {figures} |")
                print(lines[-1], flush=True)
    if options.keep:
        keep("ls", "`trainer ls` over many runs", "\n".join(lines))


if __name__ == "__main__":
    main()
