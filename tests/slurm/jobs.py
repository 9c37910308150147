"""Small training jobs for the testbed: the command line, waiting for the end, the weights that they end with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import TrainerCli, clean_environment
from tests.slurm.conftest import Testbed, wait_until
from trainer.checkpoint.store import CheckpointStore
from trainer.export.weights import export_safetensors
from trainer.runs.curves import is_measured_time
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Event

PACE = '''
import time

from lightning.pytorch import Callback


class Pace(Callback):
    """Each step takes `step_s` longer; `resumed`: also after a resume."""

    def __init__(self, step_s, resumed):
        self.step_s, self.resumed = step_s, resumed

    def on_train_start(self, trainer, *arguments):
        if trainer.global_step > 0 and not self.resumed:
            self.step_s = 0

    def on_train_batch_end(self, trainer, *arguments):
        time.sleep(self.step_s)
'''
JOB = [
    "experiment=quickstart",
    "tracking=none",
    "resources.gpus=0",
    "model.hidden=[32]",
    "checkpoint.keep_last=3",
    "trainer.max_epochs=null",
    "resilience.agree_every_s=0.2",
    "resilience.stop_deadline_s=15",
]


def on_slurm(ranks: int, nodes: int = 2) -> list[str]:
    """Overrides; without the preflight, which costs another start of every rank."""
    return [
        "cluster=slurm",
        "cluster.preflight=false",
        f"resources.nodes={nodes}",
        f"resources.cpu_processes={ranks}",
        "resources.gpus=0",
    ]


def paced(step_s: float, resumed: bool = True) -> list[str]:
    """Overrides that make each step take longer; `resumed`: also after a resume.

    `pace.py` must be in the working directory.
    """
    target = ["+callbacks.pace._target_=pace.Pace", f"+callbacks.pace.step_s={step_s}"]
    return [*target, f"+callbacks.pace.resumed={resumed}"]


def command_line(testbed: Testbed, *arguments: str, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """The command line for fixtures whose jobs outlive a test: without the test's mark in the environment."""
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        env={**clean_environment(), "SLURM_CONF": testbed.conf},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def submit(cli: TrainerCli, cwd: Path, *overrides: str, env: Mapping[str, str] | None = None) -> RunDirectory:
    """`trainer fit` with these overrides in `cwd`; the one run that is new there.

    `env`: variables for the command, and so for its job.
    """
    cwd.mkdir(exist_ok=True)
    (cwd / "pace.py").write_text(PACE)
    before = set((cwd / "runs").glob("*"))
    done = cli("fit", *JOB, *overrides, cwd=cwd, timeout=300, **({"env": dict(env)} if env else {}))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = set((cwd / "runs").iterdir()) - before
    return RunDirectory(path)


def wait_for_event(run: RunDirectory, name: str, timeout_s: float = 120, **fields: Any) -> Any:
    """The first event of this name with these fields."""

    def find() -> Event | None:
        named = [one for one in run.events() if one.event == name]
        fitting = [one for one in named if all(getattr(one, key) == value for key, value in fields.items())]
        return fitting[0] if fitting else None

    return wait_until(find, timeout_s, lambda: story(run))


def wait_for_step(run: RunDirectory, step: int, timeout_s: float = 120) -> None:
    """Until a checkpoint of this step or of a later one is committed."""
    wait_until(lambda: newest_checkpoint(run) >= step, timeout_s, lambda: story(run))


def newest_checkpoint(run: RunDirectory) -> int:
    return max((one.step for one in CheckpointStore(run.checkpoints_dir).committed()), default=-1)


def story(run: RunDirectory) -> str:
    """What a person would read of a run that did not do as it should."""
    texts = [run.events_path.read_text()]
    texts += [f"== {path.relative_to(run.path)}\n{path.read_text()}" for path in sorted(run.logs_dir.glob("**/*.log"))]
    return "\n".join(texts)[-12000:]


def weights(run: RunDirectory, step: int, folder: Path) -> dict[str, bytes]:
    """Name of a file to its bytes: the weights of a checkpoint as safetensors, however they were stored."""
    export_safetensors(CheckpointStore(run.checkpoints_dir).path(step), folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def logged_steps(run: RunDirectory) -> list[int]:
    """The step of each line of metrics.jsonl that has training metrics."""
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def curve(run: RunDirectory) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_measured_time(name)} for line in lines]


def kill(testbed: Testbed, node: str, *which: str) -> None:
    """SIGKILL to the first process of `node` that `pgrep *which` finds."""
    first = testbed("exec", node, "pgrep", *which).stdout.split()[0]
    testbed("exec", node, "kill", "-KILL", first)
