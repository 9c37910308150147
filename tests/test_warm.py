"""A process of `warm.py` sees what an executed one sees, and what only that can be is executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment
from tests.warm import WARM

LOOK = """
import json
import os
import resource
import signal
import sys
import threading

import torch
from lightning.pytorch import Callback

VARY = ("TRAINER_IMPORT_S", "TRAINER_NODE_BEGAN", "TRAINER_STORE", "TRAINER_TORCHRUN_PID", "MASTER_PORT")


class Look(Callback):
    def on_train_start(self, trainer, module):
        run = trainer.default_root_dir
        environment = {name: value.replace(run, "RUN") for name, value in os.environ.items() if name not in VARY}
        environment["TORCHELASTIC_RUN_ID"] = ""
        found = {
            "environment": environment,
            "path": [entry.replace(run, "RUN") for entry in sys.path],
            "arguments": [argument.replace(run, "RUN") for argument in sys.argv],
            "signals": {number: str(signal.getsignal(number)).split(" at ")[0] for number in signal.valid_signals()},
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "limits": [resource.getrlimit(number) for number in range(10)],
            "own session": os.getsid(0) == os.getpid(),
            "child of the fork server": os.environ["TRAINER_TORCHRUN_PID"] == str(os.getppid()),
            "threads": [torch.get_num_threads(), sorted(thread.name for thread in threading.enumerate())],
            "descriptors": len(os.listdir("/proc/self/fd")),
            "directory": os.getcwd(),
            "safe path": getattr(sys.flags, "safe_path", None),
            "hash": hash("a"),
        }
        with open(os.environ["LOOK"], "w") as file:
            json.dump(found, file)
"""
JOB = ["experiment=quickstart", "+callbacks.look._target_=look.Look", "trainer.max_steps=2", "trainer.max_epochs=null"]
JOB += ["tracking=none", "resources.gpus=0", "resources.cpu_processes=1", "trainer.limit_val_batches=1"]


@pytest.mark.usefixtures("no_orphans")
def test_a_forked_rank_sees_what_an_executed_one_sees(workdir: Path) -> None:
    (workdir / "look.py").write_text(LOOK)
    seen: list[dict[str, Any]] = []
    for runs in ("runs-executed", "runs-forked"):
        environment = {**clean_environment(), "LOOK": str(workdir / "seen.json"), "TRAINER_RUNS_DIR": runs}
        if runs == "runs-forked":
            done = WARM.run(["fit", *JOB], environment, workdir, 120)
        else:
            command = [sys.executable, "-m", "trainer", "fit", *JOB]
            done = subprocess.run(command, env=environment, cwd=workdir, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = (workdir / runs).iterdir()
        text = (workdir / "seen.json").read_text()
        seen.append(json.loads(text.replace(str(run), "RUN").replace(run.name, "ID").replace(runs, "RUNS")))
    executed, forked = seen
    assert forked.pop("environment").items() ^ executed.pop("environment").items() == set()
    assert forked == executed


@pytest.mark.parametrize(("environment", "has_torch"), [({}, True), ({"PYTHONHASHSEED": "1"}, False)])
def test_what_needs_an_interpreter_is_executed(environment: dict[str, str], has_torch: bool, workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "resolvers.py").write_text("import sys\nprint('torch:', 'torch' in sys.modules)\n")
    done = WARM.run(["fit", "--cfg", "job"], {**clean_environment(), **environment}, workdir, 60)
    assert f"torch: {has_torch}" in done.stdout + done.stderr


def test_a_module_of_the_project_hides_an_imported_one(workdir: Path) -> None:
    (workdir / "omegaconf.py").write_text("raise SystemExit('of the project')\n")
    assert "of the project" in WARM.run(["fit", "--cfg", "job"], clean_environment(), workdir, 60).stderr


@pytest.mark.usefixtures("no_orphans")
def test_output_exit_code_and_time_limit_are_those_of_a_process(workdir: Path) -> None:
    done = WARM.run(["ls", "--no-such-option"], clean_environment(), workdir, 60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--no-such-option" in done.stderr
    with pytest.raises(subprocess.TimeoutExpired):
        WARM.run(["fit", "--cfg", "job"], clean_environment(), workdir, 0.001)
    piped = WARM.shell("trainer --version | tr a-z A-Z", clean_environment(), workdir, 60)
    assert piped.stdout.startswith("TRAINER ")
