"""A process of `warm.py` sees what an executed one sees, and what only that can be is executed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment
from tests.warm import IMPORTING, ROOT, WARM
from trainer.cli import VERBS

SHOWN = ROOT / "tests" / "shown_process.py"

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


def run(
    *arguments: str, env: dict[str, str] | None = None, forked: bool = True, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    WARM.switch(forked)
    environment = {**clean_environment(), **(env or {})}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, **options
    )


@pytest.mark.usefixtures("no_orphans")
def test_a_forked_rank_sees_what_an_executed_one_sees(workdir: Path) -> None:
    (workdir / "look.py").write_text(LOOK)
    seen: list[dict[str, Any]] = []
    for runs in ("runs-executed", "runs-forked"):
        environment = {"LOOK": str(workdir / "seen.json"), "TRAINER_RUNS_DIR": runs}
        done = run("-m", "trainer", "fit", *JOB, env=environment, forked=runs == "runs-forked")
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = (workdir / runs).iterdir()
        text = (workdir / "seen.json").read_text()
        seen.append(json.loads(text.replace(str(path), "RUN").replace(path.name, "ID").replace(runs, "RUNS")))
    executed, forked = seen
    assert forked.pop("environment").items() ^ executed.pop("environment").items() == set()
    assert forked == executed


@pytest.mark.usefixtures("no_orphans")
@pytest.mark.parametrize("kind", ["file", "-c", "-m"])
def test_a_forked_process_is_a_child_like_an_executed_one(kind: str, workdir: Path) -> None:
    started = {"file": [str(SHOWN)], "-c": ["-c", SHOWN.read_text()], "-m": ["-P", "-m", "tests.shown_process"]}[kind]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.umask(0o077), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        seen = [
            run(*started, "an argument", env={"PYTHONPATH": str(ROOT)}, forked=forked, input="given")
            for forked in (False, True)
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.umask(before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert [done.returncode for done in seen] == [7, 7], seen
    assert [done.stderr for done in seen] == ["to the other stream\n"] * 2
    executed, forked = (json.loads(done.stdout) for done in seen)
    del forked["path"][len(executed["path"]) :]  # setuptools adds a folder of its own
    of_torch = forked["environment"].keys() - executed["environment"].keys()
    assert {name: value for name, value in forked["environment"].items() if name not in of_torch} == (
        executed["environment"]
    )
    assert {**forked, "environment": {}} == {**executed, "environment": {}}
    assert forked["parent"] == os.getpid()
    assert forked["is marked"]


@pytest.mark.usefixtures("no_orphans")
def test_commands_at_once_do_not_share_a_thing() -> None:
    """Each has its own output, exit code, random numbers and variables, and none its predecessors'."""
    code = (
        "import os, random, sys, time, numpy, torch; print(os.environ.get('ONLY'), random.random(), "
        "numpy.random.rand(), sorted(threading.enumerate()) if 'threading' in globals() else '', os.getpid()); "
        "time.sleep(0.2); torch.rand(1); sys.exit(int(os.environ.get('ONLY') or 9))"
    )
    WARM.switch(True)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**clean_environment(), **({"ONLY": str(number)} if number else {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    outputs = [process.communicate(timeout=300)[0].split() for process in started]
    assert [process.returncode for process in started] == [9, 1, 2, 3, 4, 5, 6, 7]
    assert [output[0] for output in outputs] == ["None", "1", "2", "3", "4", "5", "6", "7"]
    for column in (1, 2, 3):  # random numbers of two libraries, process ids
        assert len({output[column] for output in outputs}) == 8


@pytest.mark.usefixtures("no_orphans")
def test_signals_and_limits_of_time_end_a_forked_process() -> None:
    WARM.switch(True)
    command = [sys.executable, "-c", "import time, torch; print(1, flush=True); time.sleep(60)"]
    for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signum)
            assert process.wait(300) == -signum
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=0.5)


@pytest.mark.usefixtures("no_orphans")
def test_what_a_forked_process_starts_is_forked_as_its_child() -> None:
    inner = "import os, sys; print(os.getppid(), 'torch' in sys.modules)"
    outer = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}]); print(os.getpid())"
    parent, has_torch, pid = run("-c", outer).stdout.split()
    assert (parent, has_torch) == (pid, "True")


@pytest.mark.parametrize(("environment", "has_torch"), [({}, True), ({"PYTHONHASHSEED": "1"}, False)])
def test_what_needs_an_interpreter_is_executed(environment: dict[str, str], has_torch: bool, workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "resolvers.py").write_text("import sys\nprint('torch:', 'torch' in sys.modules)\n")
    done = run("-m", "trainer", "fit", "--cfg", "job", env=environment)
    assert f"torch: {has_torch}" in done.stdout + done.stderr


def test_commands_that_import_no_torch_are_executed() -> None:
    """They would take more time to fork."""
    verbs = {verb for group in VERBS.values() for verb in group}
    assert verbs >= IMPORTING
    assert not IMPORTING & {"ls", "show", "logs"}
    code = "import sys; print(len(sys.modules) < 300)"
    assert run("-c", code).stdout == "True\n"
    assert run("-c", f"{code}  # torch").stdout == "False\n"


@pytest.mark.executed
def test_a_marked_test_executes_what_it_starts() -> None:
    probe = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    assert subprocess.run(probe, capture_output=True, text=True).stdout == "False\n"


def test_a_module_of_the_project_hides_an_imported_one(workdir: Path) -> None:
    (workdir / "omegaconf.py").write_text("raise SystemExit('of the project')\n")
    assert "of the project" in run("-m", "trainer", "fit", "--cfg", "job").stderr


@pytest.mark.usefixtures("no_orphans")
def test_commands_of_a_shell_are_forked(workdir: Path) -> None:
    WARM.switch(True)
    piped = WARM.shell("trainer --version | tr a-z A-Z", clean_environment(), workdir, 60)
    assert piped.stdout.startswith("TRAINER ")
    failed = WARM.shell("trainer ls --no-such-option | cat", clean_environment(), workdir, 60)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "--no-such-option" in failed.stderr
    both = WARM.shell("trainer --version & trainer --version; wait", clean_environment(), workdir, 60)
    assert both.stdout.count("trainer ") == 2
    with pytest.raises(subprocess.TimeoutExpired):
        WARM.shell("trainer fit --cfg job", clean_environment(), workdir, 0.001)
