"""The fork server of a node: it forks torchrun, and each rank that torchrun starts or restarts.

    fork server ──┬── torchrun: rendezvous and restarts; requests ranks over a pipe, and receives their exit codes
                  ├── rank 0
                  └── rank 1 ...

`agent.py` imports what they share, and this file by its path: it imports nothing from the package, which may be an
older one. All processes here are forks of one, so the messages in the pipe are objects of one version.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

IMPORT_S_VARIABLE = "TRAINER_IMPORT_S"
"""Seconds that this process spent importing, for the ranks of the first attempt; read by
`trainer/runtime/heartbeat.py`."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
"""Options of prctl(2)."""
_LIBC = ctypes.CDLL(None)

Main = Callable[[], object]


@dataclass(frozen=True)
class StartRank:
    """torchrun asks for a rank."""

    arguments: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class RankStarted:
    """The answer to `StartRank`."""

    pid: int


@dataclass(frozen=True)
class RankNotStarted:
    """The answer to `StartRank` if the fork has failed."""

    errno: int
    reason: str


@dataclass(frozen=True)
class RankEnded:
    """A rank has ended."""

    pid: int
    code: int
    """Exit code; negative: the signal that killed it."""


def keep_operators() -> None:
    """Leave the operators that torch.library has registered where they are when a fork of this process exits.

    Deregistering them one by one copies 8,000 pages that are shared with the server: 0.06 s of CPU in each process.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/library.py
    """
    finalizers: dict[Any, Any] = getattr(weakref.finalize, "_registry", {})
    for finalizer, its in list(finalizers.items()):
        if getattr(its.func, "__module__", None) == "torch.library":
            finalizer.atexit = False


class ForkServer:
    """Forks torchrun and the ranks that it requests, waits for them, and exits as torchrun exits.

    Args:
        import_s: Seconds that this process spent importing, for the ranks of the first attempt.
        private_variable: Variable with the descriptor of a socket that only torchrun keeps.
    """

    def __init__(self, import_s: float, private_variable: str) -> None:
        self._import_s, self._private_variable = import_s, private_variable
        self._pid = os.getpid()
        self._pipe, self._torchruns_end = Pipe()
        self._woken, self._wakes = os.pipe()
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)

    def serve(self, torchrun: Main) -> Main:
        """Fork, and return what this process has to run: torchrun, a rank, or in the server an exit like torchrun's."""
        keep_operators()
        sys.stdout.flush()
        sys.stderr.flush()
        agent = os.fork()
        if agent == 0:
            _die_with(self._pid)
            self._leave_server()
            _fork_ranks_through(self._torchruns_end)
            return lambda: _run_to_the_end(torchrun)
        self._torchruns_end.close()
        private = os.environ.pop(self._private_variable, None)
        if private is not None:
            os.close(int(private))
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
                self._send(RankEnded(pid, code))
            if self._pipe in readable:
                try:
                    request: StartRank = self._pipe.recv()
                except (EOFError, OSError):  # torchrun is exiting
                    sources.remove(self._pipe)
                    continue
                rank = self._start(request.arguments, request.environment)
                if rank is not None:
                    return rank

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Main | None:
        """Fork a rank. Returns what it runs in the rank, None in this process."""
        ready, not_yet = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            self._send(RankNotStarted(error.errno or 0, error.strerror or ""))
            pid = -1
        if pid == 0:
            os.setsid()  # as torchrun does, which signals the process group of a rank
            os.close(ready)
            os.close(not_yet)
            self._leave_server()
            if environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                environment[IMPORT_S_VARIABLE] = f"{self._import_s:.3f}"
            if arguments[0] != sys.executable:  # PYTHON_EXEC or --numa-binding of torchrun
                return lambda: os.execvpe(arguments[0], arguments, environment)
            return lambda: _run_to_the_end(lambda: run_python(arguments, environment))
        os.close(not_yet)
        os.read(ready, 1)  # returns when the rank has closed its end or exited
        os.close(ready)
        if pid > 0:
            self._send(RankStarted(pid))
        return None

    def _leave_server(self) -> None:
        """Reset signal handling and close the server's descriptors, in a process that was just forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._pipe.close()
        os.close(self._woken)
        os.close(self._wakes)

    def _send(self, message: RankStarted | RankNotStarted | RankEnded) -> None:
        try:
            self._pipe.send(message)
        except OSError:  # torchrun is exiting
            pass


def _ended() -> list[tuple[int, int]]:
    """Return process id and exit code (negative: the signal) of each child that has ended since the last call."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pid = 0
        if pid == 0:
            return ended
        ended.append((pid, os.waitstatus_to_exitcode(status)))


def _end_as(code: int) -> None:
    """End with the exit code or signal of torchrun. The remaining ranks die with this process."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))  # skips the teardown of modules, which takes time


def _die_with(parent: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _run_to_the_end(main: Main) -> NoReturn:
    """Run `main`, and exit as the interpreter does, except that no module is taken down.

    That would copy memory shared with the server page by page: 0.5 s of CPU in each rank, for which a restart waits.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads; multiprocessing's processes do the same
    atexit._run_exitfuncs()
    for one in gc.get_objects():  # without those of the server, which are frozen
        if issubclass(type(one), io.IOBase):
            with contextlib.suppress(Exception):  # closed, or its disk is full
                one.flush()
    os._exit(code & 0xFF)


def run_python(arguments: list[str], environment: dict[str, str]) -> None:
    """Run `python [-u] -m MODULE ...` or `python [-u] FILE ...` in this process, with this environment."""
    os.environ.clear()
    os.environ.update(environment)
    _LIBC.prctl(_PR_SET_NAME, f"rank {environment.get('RANK')}".encode())  # shown by ps and top
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
    """Set the values that imports have read from the environment of the server instead of the rank's."""
    for module, variable in (
        ("lightning_utilities.core.rank_zero", "RANK"),
        ("torchmetrics.utilities.prints", "LOCAL_RANK"),
    ):
        if module in sys.modules:
            sys.modules[module].rank_zero_only.rank = int(os.environ.get(variable, "0"))
    # Generators that nobody seeds must differ between ranks.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _fork_ranks_through(pipe: Connection) -> None:
    """Make torchrun in this process start its ranks through the fork server."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    ranks = _Ranks(pipe)

    class ForkedHandler(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return _Rank(ranks, ranks.start(list(args), env))

        def close(self, death_sig: signal.Signals | None = None) -> None:
            try:
                super().close(death_sig)
            except ProcessLookupError:  # the server has waited for it already
                pass

    # Not public, but every start and restart of a rank goes through it (torch 2.11 to 2.13); `_import_all` checks it.
    api.get_subprocess_handler = ForkedHandler  # type: ignore[assignment]


class _Ranks:
    """Client of the fork server in torchrun."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._codes: dict[int, int] = {}
        """Process id to exit code of the ranks that have ended."""

    def start(self, arguments: list[str], environment: dict[str, str]) -> int:
        """Start a rank and return its process id.

        Raises:
            OSError: The fork failed.
        """
        self._pipe.send(StartRank(arguments, environment))
        while True:
            message: RankStarted | RankNotStarted | RankEnded = self._pipe.recv()
            if isinstance(message, RankNotStarted):
                raise OSError(message.errno, message.reason)
            if isinstance(message, RankStarted):
                self._codes.pop(message.pid, None)  # of an earlier process with the same id
                return message.pid
            self._codes[message.pid] = message.code

    def code(self, pid: int, timeout_s: float | None) -> int | None:
        """Return the exit code of a rank; None if it has not ended within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pid not in self._codes:
            if not self._pipe.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None
            ended: RankEnded = self._pipe.recv()
            self._codes[ended.pid] = ended.code
        return self._codes[pid]


class _Rank:
    """The part of `subprocess.Popen` that torchrun uses."""

    def __init__(self, ranks: _Ranks, pid: int) -> None:
        self._ranks = ranks
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while the rank runs."""
        self.returncode = self._ranks.code(self.pid, 0.0) if self.returncode is None else self.returncode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the rank and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It has not ended within `timeout` seconds.
        """
        if self.returncode is None:
            self.returncode = self._ranks.code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"rank with process id {self.pid}", timeout or 0.0)
        return self.returncode
