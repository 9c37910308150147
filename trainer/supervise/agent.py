"""torchrun as this project starts it: `python trainer/supervise/agent.py`, with torchrun's own arguments.

Importing torch and Lightning is most of the start of a rank, and the ranks of a node that all do it at once fight for
cores and for the file system. So this process imports once what they need (TRAINER_PRELOAD) and forks: first torchrun,
then each rank that torchrun asks for, also when it starts them again:

    this process ──┬── torchrun: rendezvous and restarts; asks for ranks over a pipe, and hears there how they end
                   ├── rank 0
                   └── rank 1 ...

It has no threads of Python and no CUDA, which do not survive a fork. Where that cannot be had, torchrun runs in this
process and starts its ranks as it always does.

Run by file, not as a module: the code frozen in a run directory goes before the installed one and may be older than
this. So nothing of the package is imported here but what TRAINER_PRELOAD names.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PRELOAD_VARIABLE = "TRAINER_PRELOAD"
"""The module with whose import a rank spends its start; unset or empty: each rank is a new process."""
IMPORT_S_VARIABLE = "TRAINER_IMPORT_S"
"""For the ranks of the first attempt: the seconds that this process spent importing before it could fork them. Read by
`trainer/runtime/heartbeat.py`."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
"""prctl(2)"""
_LIBC = ctypes.CDLL(None)
_ACCELERATORS = ("/dev/nvidia-uvm", "/dev/dxg", "/dev/kfd")
"""Open in a process that has initialised CUDA (the second under WSL) or ROCm; asking NVML how many GPUs there are does
not open them."""

Main = Callable[[], object]


def main() -> None:
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 puts the folder of this file first
        sys.path.pop(0)
    began = time.monotonic()
    obstacle = _import_all(os.environ.pop(PRELOAD_VARIABLE, ""))
    from torch.distributed.run import main as torchrun

    if obstacle is None:
        ForkServer(time.monotonic() - began).serve(torchrun)()
        return
    if obstacle:
        print(f"each rank imports torch for itself: {obstacle}", flush=True)
    torchrun()


def _import_all(module: str) -> str | None:
    """Import torchrun and `module`; None when ranks can be forked now, else why not, empty when nobody asked.

    Without looking for garbage in what modules define: with it, torchrun alone costs 2.2 s of CPU and not 1.3 s.
    """
    gc.disable()
    try:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2)  # where an import stands that does not end
        importlib.import_module("torch.distributed.run")
        if not module or not sys.platform.startswith("linux"):
            return ""
        from torch.distributed.elastic.multiprocessing import api

        if not hasattr(api, "get_subprocess_handler"):
            return "this torch starts its workers in another way"
        imports = _module_of_imports()
        with imports.quick_imports():
            importlib.import_module(module)
        # OpenBLAS has threads of its own, and ends them before a fork.
        return "importing started a thread" if threading.active_count() > 1 else cannot_fork(Path("/proc/self"))
    except Exception as error:  # a rank will meet it, too, and say it in its log
        return f"{type(error).__name__}: {error}"
    finally:
        gc.freeze()
        gc.enable()


def _module_of_imports() -> Any:
    try:
        return importlib.import_module("trainer.runtime.imports")
    except ModuleNotFoundError:  # a run has frozen the package as it was before 0.2
        return importlib.import_module("trainer.worker.imports")


def cannot_fork(process: Path) -> str | None:
    """Why the process with this folder under /proc must not be forked; None when it may be."""
    for descriptor in (process / "fd").iterdir():
        try:
            device = os.readlink(descriptor)
        except OSError:  # the one with which the folder is read
            continue
        if device in _ACCELERATORS:
            return f"importing opened {device}"
    return None


class ForkServer:
    """Forks torchrun and the ranks it asks for, reaps them all, and ends as torchrun ends."""

    def __init__(self, import_s: float) -> None:
        from multiprocessing import Pipe  # not above: the command line imports this file for a name

        self._import_s = import_s
        self._pid = os.getpid()
        self._pipe, self._torchruns_end = Pipe()
        self._woken, self._wakes = os.pipe()
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)

    def serve(self, torchrun: Main) -> Main:
        """Returns in each process what it is there for: torchrun, a rank, or in this one an end like torchrun's."""
        sys.stdout.flush()
        sys.stderr.flush()
        agent = os.fork()
        if agent == 0:
            _die_with(self._pid)
            self._leave_server()
            _fork_ranks_through(self._torchruns_end)
            return torchrun
        self._torchruns_end.close()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        sources: list[Any] = [self._woken, self._pipe]
        while True:
            readable = select.select(sources, [], [])[0]
            if self._woken in readable:
                os.read(self._woken, 4096)
            for pid, code in _ended():
                if pid == agent:
                    return lambda: _end_as(code)
                self._tell("ended", pid, code)
            if self._pipe in readable:
                try:
                    request = self._pipe.recv()
                except (EOFError, OSError):  # torchrun leaves
                    sources.remove(self._pipe)
                    continue
                rank = self._start(*request)
                if rank is not None:
                    return rank

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Main | None:
        """Fork a rank; returns what it runs, in the rank only."""
        ready, not_yet = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell("failed", error.errno or 0, error.strerror)
            pid = -1
        if pid == 0:
            os.setsid()  # like a rank of torchrun's own, whose whole group is signalled
            os.close(ready)
            os.close(not_yet)
            self._leave_server()
            if environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                environment[IMPORT_S_VARIABLE] = f"{self._import_s:.3f}"
            if arguments[0] != sys.executable:  # PYTHON_EXEC, which torchrun knows; --numa-binding
                return lambda: os.execvpe(arguments[0], arguments, environment)
            return lambda: run_python(arguments, environment)
        os.close(not_yet)
        os.read(ready, 1)  # returns when the rank has closed its end, or is gone
        os.close(ready)
        if pid > 0:
            self._tell("started", pid, 0)
        return None

    def _leave_server(self) -> None:
        """In a process just forked: keep nothing of the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._pipe.close()
        os.close(self._woken)
        os.close(self._wakes)

    def _tell(self, what: str, number: int, detail: object) -> None:
        try:
            self._pipe.send((what, number, detail))
        except OSError:  # torchrun leaves
            pass


def _ended() -> list[tuple[int, int]]:
    """Process id and exit code (negative: the signal) of each child that has ended since."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pid = 0
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _end_as(code: int) -> None:
    """The ranks that are left die with this process."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))  # there is nothing to finish, and taking the modules apart takes its time


def _die_with(parent: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def run_python(arguments: list[str], environment: dict[str, str]) -> None:
    """Become what `arguments` (`python [-u] -m MODULE ...` or `python [-u] FILE ...`) would be in this environment."""
    os.environ.clear()
    os.environ.update(environment)
    _LIBC.prctl(_PR_SET_NAME, f"rank {environment.get('RANK')}".encode())  # the name in ps and top
    _forget_the_server()
    what = [argument for argument in arguments[1:2] if argument != "-u"] + arguments[2:]
    if what[0] == "-m":
        sys.argv = what[1:]
        runpy.run_module(what[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = what
        if not getattr(sys.flags, "safe_path", False):
            sys.path.insert(0, os.path.dirname(os.path.abspath(what[0])))
        runpy.run_path(what[0], run_name="__main__")


def _forget_the_server() -> None:
    """Undo what imports took from the server's environment and would have taken from the rank's."""
    for module, variable in (
        ("lightning_utilities.core.rank_zero", "RANK"),
        ("torchmetrics.utilities.prints", "LOCAL_RANK"),
    ):
        if module in sys.modules:
            sys.modules[module].rank_zero_only.rank = int(os.environ.get(variable, "0"))
    # What nobody seeds is not the same on every rank.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _fork_ranks_through(pipe: Connection) -> None:
    """Have torchrun in this process get its ranks from the fork server."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    ranks = _Ranks(pipe)

    class ForkedHandler(SubprocessHandler):  # type: ignore[misc]
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return _Rank(ranks, ranks.start(list(args), env))

        def close(self, death_sig: signal.Signals | None = None) -> None:
            try:
                super().close(death_sig)
            except ProcessLookupError:  # the server has reaped it meanwhile
                pass

    # Not public, but the one place that every start and restart of a rank comes through; `_import_all` looks for it.
    api.get_subprocess_handler = ForkedHandler  # type: ignore[assignment]


class _Ranks:
    """The fork server, as seen by torchrun."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._codes: dict[int, int] = {}
        """By process id, of those that have ended."""

    def start(self, arguments: list[str], environment: dict[str, str]) -> int:
        """The process id of a new rank. Raises OSError when there can be none."""
        self._pipe.send((arguments, environment))
        while True:
            what, number, detail = self._pipe.recv()
            if what == "failed":
                raise OSError(number, detail)
            if what == "started":
                self._codes.pop(number, None)  # of one before it, which had the same number
                return int(number)
            self._codes[number] = detail

    def code(self, pid: int, timeout_s: float | None) -> int | None:
        """How the rank ended; None when it has not within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pid not in self._codes:
            if not self._pipe.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None
            _, ended, code = self._pipe.recv()
            self._codes[ended] = code
        return self._codes[pid]


class _Rank:
    """What torchrun uses of a `subprocess.Popen`."""

    def __init__(self, ranks: _Ranks, pid: int) -> None:
        self._ranks = ranks
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self.returncode = self._ranks.code(self.pid, 0.0) if self.returncode is None else self.returncode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._ranks.code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"rank with process id {self.pid}", timeout or 0.0)
        return self.returncode


if __name__ == "__main__":
    main()
