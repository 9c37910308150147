"""`wandb agent` runs trials of two ranks: the W&B run is the trial's, and a trial that it stops has saved and ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import clean_environment
from tests.documentation import ROOT
from tests.tracking.wandb_server import ENTITY, WandbServer

PACE = """
import time

from lightning.pytorch import Callback


class Pace(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.optimizers[0].param_groups[0]["lr"] > 0.1:
            time.sleep(0.5)  # the trial that is stopped
"""
SETTINGS = [
    "resources.cpu_processes=2",
    "trainer.max_steps=200",
    "trainer.log_every_n_steps=20",
    "scheduler=constant",
    "+callbacks.pace._target_=pace.Pace",
]


def sweep_of_docs() -> dict[str, object]:
    """The sweep.yaml of docs/tracking.md, for an experiment of the tests."""
    text = (ROOT / "docs" / "tracking.md").read_text()
    (block,) = re.findall(r"```yaml\n# sweep\.yaml\n(.*?)```", text, re.DOTALL)
    sweep: dict[str, object] = yaml.safe_load(block)
    return sweep


def test_two_trials_of_two_ranks(workdir: Path) -> None:
    (workdir / "pace.py").write_text(PACE)
    sweep = sweep_of_docs()
    command = sweep["command"]
    assert isinstance(command, list)
    assert command[:2] == ["trainer", "fit"]
    assert command[-1] == "${args_no_hyphens}"
    sweep["command"] = [sys.executable, "-m", "trainer", "fit", "experiment=quickstart", *SETTINGS, command[-1]]
    sweep["parameters"] = {"optimizer.lr": {"values": [0.01, 0.2]}}
    with WandbServer() as server:
        name = server.add_sweep(sweep, "proof")
        process = subprocess.Popen(
            [sys.executable, "-m", "wandb", "agent", f"{ENTITY}/proof/{name}"],
            cwd=workdir,
            env={**clean_environment(), **server.environment(), "HOME": str(workdir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stops = threading.Thread(target=_stop_the_second, args=(server, name, process))
        stops.start()
        said, _ = process.communicate(timeout=300)
        stops.join()
        assert process.returncode == 0, said
        assert server.unknown == [], said
        served = [server.runs[one] for one in server.sweeps[name].given]
    runs = sorted((workdir / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(runs) == 2, said
    facts = [json.loads((run / "wandb.json").read_text()) for run in runs]
    assert {one["id"] for one in facts} == {f"{name}run0", f"{name}run1"}
    assert [one.sweep for one in served] == [name, name]
    assert [one.project for one in served] == ["proof", "proof"]
    assert [one.config["optimizer.lr"] for one in served] == [0.01, 0.2]
    assert [one.config["about"]["world_size"] for one in served] == [2, 2]
    assert [one.exit_code for one in served] == [0, 0]
    ends = [
        [line["event"] for line in map(json.loads, (run / "events.jsonl").read_text().splitlines())] for run in runs
    ]
    assert sorted(end[-1] for end in ends) == ["finished", "stopped"]
    finished = next(run for run, end in zip(runs, ends, strict=True) if end[-1] == "finished")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rows = {row["trainer/global_step"]: row["train/loss"] for row in served[0].history if "train/loss" in row}
    assert rows == pytest.approx({line["step"]: line["train/loss"] for line in lines if "train/loss" in line}, rel=1e-6)
    assert not list(workdir.glob("wandb/*run-*"))  # a trial keeps its files in its run directory


def _stop_the_second(server: WandbServer, sweep: str, process: subprocess.Popen[str]) -> None:
    """Stop the second trial once it trains, as the server does when it is told to by a person or by early stopping."""
    while process.poll() is None:
        given = server.sweeps[sweep].given
        if len(given) == 2 and given[1] in server.runs:
            server.sweeps[sweep].stops.add(given[1])
            return
        time.sleep(0.1)
