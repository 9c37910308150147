"""Fixtures of the suite: a working directory, the command line in a process of its own, nothing left behind."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.composing import load_once
from tests.warm import MARK, WARM
from trainer.core.hardware import count_gpus
from trainer.core.processes import children
from trainer.runs.directory import RunDirectory

SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
# Read when torch is loaded, here and in what the tests start. The suite has more threads than cores: one that waits for
# another must not keep it from its core. A job of two threads takes 16 s alone, and took 90 s among the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

OWN_THREADS = ("heartbeat", "usage", "checkpoint-writer")
ROOT = Path(__file__).parents[1]
CPU_TABLE, CPU_ROWS = "CPU seconds, and seconds in all, by file: the most expensive", 25
FIRST = (
    "oracle/",  # the longest file, and it never waits: beside those that wait for SLURM
    "slurm/",
    "projects/",
    "distributed/",
    "faultbench/",
    "test_docs",
    "test_resume",
    "benchmarks/",
    "train/test_exact_resume",
    "train/test_deferred",
    "cli/",
    "launch/",
    "tracking/",
    "supervise/",
    "runtime/",
)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the IDX files."""
_NOT_INHERITED = ("WANDB_", "TRAINER_", "SLURM_", "HYDRA_", "PL_", "TORCHELASTIC_")
_NOT_INHERITED_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
_NOT_INHERITED_NAMES |= {"COLUMNS", "LINES"}  # pytest-xdist's, which is no terminal's


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--executed", action="store_true", help="start every process by exec: slower (tests/warm.py)")


TABLES = pytest.StashKey[dict[str, list[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started with & by a shell; what tests start inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    load_once()
    gc.disable()  # until all modules are imported, which leaves no garbage


def pytest_collection_finish() -> None:
    gc.freeze()  # half a million objects, which each full collection would visit
    gc.enable()


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> dict[str, list[str]]:
    """Title to lines: what tests measured, printed after the last of them, by whichever process it was run."""
    return pytestconfig.stash[TABLES]


@pytest.fixture(scope="module", autouse=True)
def cpu_seconds(request: pytest.FixtureRequest, tables: dict[str, list[str]]) -> Iterator[None]:
    """What each file's tests cost, with the processes that they start and wait for: the suite has two cores."""
    began, began_at = _cpu_s(), time.monotonic()
    yield
    took, took_in_all = _cpu_s() - began, time.monotonic() - began_at
    tables.setdefault(CPU_TABLE, []).append(f"{took:7.1f} {took_in_all:7.1f}  {request.path.relative_to(ROOT)}")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A heartbeat that outlives its test writes into the next one."""
    before = set(threading.enumerate())
    yield
    left = [one.name for one in threading.enumerate() if one not in before and one.name in OWN_THREADS]
    assert not left


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ended = sum(one.ru_utime + one.ru_stime for one in used)
    return ended + sum(_own_and_waited_for_s(pid) for pid in children(os.getpid()))


def _own_and_waited_for_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has just ended
        return 0.0
    ticks = stat.rpartition(")")[2].split()[11:15]  # proc_pid_stat(5): utime, stime, cutime, cstime
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    WARM.switch(not item.config.getoption("--executed") and item.get_closest_marker("executed") is None)
    try:
        return (yield)
    finally:
        WARM.switch(False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["tables"] = session.config.stash[TABLES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for title, lines in getattr(node, "workeroutput", {}).get("tables", {}).items():
        node.config.stash[TABLES].setdefault(title, []).extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, lines in config.stash[TABLES].items():
        terminalreporter.section(title)
        for line in sorted(lines, reverse=True)[:CPU_ROWS] if title == CPU_TABLE else lines:
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why. What takes long comes first: its waits are others' time."""
    items.sort(key=lambda item: _turn(item.path.relative_to(ROOT / "tests").as_posix()))
    missing = [program for program in SLURM_PROGRAMS if not shutil.which(program, path=_admin_path())]
    no_slurm = "no " + ", ".join(missing) if missing else "not root" if os.geteuid() != 0 else ""
    reasons = {
        "slow": "" if config.getoption("--slow") else "run with --slow",
        "gpu": "" if count_gpus() else "no CUDA device",
        "slurm": no_slurm,
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def _turn(path: str) -> int:
    return next((turn for turn, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))


def _admin_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def clean_environment() -> dict[str, str]:
    """This process's environment without keys and modes of W&B, and without those of a job around the tests."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name == MARK or not name.startswith(_NOT_INHERITED)) and name not in _NOT_INHERITED_NAMES
    }


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, and the current one; runs are made and looked for in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_RUNS_DIR", raising=False)
    return tmp_path


@pytest.fixture
def no_orphans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when a process that it started, at any depth, is alive a minute after it; kills those."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield
    deadline = time.monotonic() + 60
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert not left, f"processes left behind: {left}"


def marked_processes(mark: str) -> dict[int, str]:
    """Process id to command line of the live processes with this mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone, or another user's
            continue
    return found


def freeze_older_code(run: RunDirectory) -> None:
    """Make a run look as if it was launched from a checkout of this project before `agent.py` started its ranks."""
    newer = shutil.ignore_patterns("agent.py", "fork_server.py", "__pycache__")
    shutil.copytree(ROOT / "trainer", run.code_dir / "trainer", ignore=newer)


TrainerCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def trainer_cli(workdir: Path, no_orphans: None) -> TrainerCli:
    """`trainer_cli("fit", "a=b", timeout=300)`: the command in a process of its own, with a clean environment.

    `env` adds variables, `cwd` is another directory than `workdir`. Returns the CompletedProcess, output as text.
    Much of the suite's CPU time is the start of jobs: what can share one does.
    """

    def run(
        *arguments: str, timeout: float = 120, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {**clean_environment(), **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            env=environment,
            cwd=cwd or workdir,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """The IDX files of Fashion-MNIST; skips where they are not installed."""
    if not any(FASHION_MNIST.glob("*ubyte*")):
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    return FASHION_MNIST
