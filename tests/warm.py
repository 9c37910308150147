"""Runs commands of `trainer` without the start of an interpreter, in processes that are forked and not executed.

Most of the CPU time of a command that trains is `import torch`. So one process imports it once for a process of pytest:

    server: has imported torch and this package, has no threads
      └── trainer fit ...        forked for a command of a test
            └── node             what it starts with `subprocess`: each was forked before the command began, as a spare,
                  └── agent.py   and so knows nothing of it
                        └── rank

Process ids, parents, sessions, signals, descriptors, environment variables and exit codes are those of executed
processes. `/proc/PID/cmdline` and `/proc/PID/environ` are the server's, and more modules are imported. What only a new
interpreter can do (another hash seed, a module of the project with the name of an imported one) is executed as usual.

For tests to which processes are not the point: `pytestmark = pytest.mark.warm`.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import inspect
import marshal
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, NoReturn

from trainer.core import processes

PRELOADED = (
    "trainer.train.run",
    "trainer.cli.fit",
    "trainer.cli.launching",
    "trainer.supervise.supervisor",
    "trainer.report.write",
    "torch.distributed.run",
)
SPARES = {"trainer": 5, "trainer.supervise.node": 2}
"""Module to how many processes it may start without an interpreter."""
_PR_SET_CHILD_SUBREAPER = 36
_LARGEST_MESSAGE, _MOST_DESCRIPTORS, _OWN_DESCRIPTOR = 1 << 17, 32, 500
_OF_THE_INTERPRETER = ("PYTHON", "LC_", "LANG", "LD_", "OMP_WAIT_POLICY", "MALLOC_")
_SET_HERE = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONHASHSEED"}
_PYTHON = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
_EXECUTE_CHILD = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_PARAMETERS = list(inspect.signature(_EXECUTE_CHILD).parameters)[1:]


@dataclass(frozen=True)
class Command:
    """`python ARGUMENT...`, and what a process inherits; its descriptors are sent beside it."""

    arguments: list[str]
    """The first is the interpreter."""
    environment: dict[str, str]
    cwd: str
    numbers: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of the descriptors."""
    new_session: bool = False
    before: tuple[str, bytes, list[Any]] | None = None
    """`preexec_fn`: its module, code and variables."""
    ignored: list[int] = field(default_factory=list)
    """Signals."""

    def message(self) -> bytes:
        return pickle.dumps(vars(self))

    @staticmethod
    def received(message: bytes) -> Command:
        return Command(**pickle.loads(message))


# In the server, and in what it forks.


@dataclass(frozen=True)
class _Fresh:
    """What a process has at its start, kept by the server for those that it forks."""

    environment: dict[str, str]
    path: list[str]
    names: frozenset[str]
    """Top-level modules."""
    of_imports: dict[str, str]
    """Variables that modules have set while they were imported."""
    threads: int


_fresh: _Fresh
_spares: list[tuple[int, socket.socket]] = []


def serve(number: int, parent: int) -> None:
    """Run the commands that come through the socket `number`, one after another."""
    processes.die_with_parent(signal.SIGKILL, parent)
    if sys.version_info < (3, 11):
        sys.path.pop(0)  # the folder of this file
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a command leaves behind is found below this process
    _import()
    channel = socket.socket(fileno=number)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _LARGEST_MESSAGE, _MOST_DESCRIPTORS)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become(Command.received(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(pickle.dumps(pid))
        ended = status = 0
        while ended != pid:
            ended, status = os.wait()
        channel.send(pickle.dumps(os.waitstatus_to_exitcode(status)))


def _import() -> None:
    from trainer.runtime.imports import quick_imports

    before = set(os.environ)
    with quick_imports():
        for name in PRELOADED:
            importlib.import_module(name)
    import torch

    from trainer.launch import local

    local.start_ahead = lambda config: None  # what it would import is here
    global _fresh
    names = frozenset(name.partition(".")[0] for name in sys.modules)
    of_imports = {name: value for name, value in os.environ.items() if name not in before}
    _fresh = _Fresh(dict(os.environ), list(sys.path), names, of_imports, torch.get_num_threads())
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()


def _become(command: Command, descriptors: list[int]) -> NoReturn:
    """Run the command in this process, which has just been forked from the server or is a spare."""
    code = 1
    try:
        module, arguments = _parse(command.arguments)
        _fork_spares(SPARES.get(module, 0))
        _take_place(command, descriptors)
        if _needs_an_interpreter():
            os.execve(command.arguments[0], command.arguments, os.environ)
        _set_up_python(command, module)
        code = _run(module, arguments)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _run(module: str, arguments: list[str]) -> int:
    """The exit code."""
    sys.argv = [module, *arguments]
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            found = importlib.util.find_spec(module)
            is_package = found is not None and found.submodule_search_locations is not None
            sys.modules.pop(f"{module}.__main__" if is_package else module, None)  # as __main__ it is another one
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The module or file that `python ARGUMENT...` runs, and its own arguments; "" if neither is one of ours."""
    rest = list(arguments[1:])
    while rest[:1] in (["-P"], ["-u"]):
        rest.pop(0)
    if rest[:1] == ["-m"] and rest[1].partition(".")[0] == "trainer":
        return rest[1], rest[2:]
    if rest and rest[0].endswith("supervise/agent.py"):
        return rest[0], rest[1:]
    return "", []


def _fork_spares(count: int) -> None:
    """Fork the processes that this one may need, while it is as new as they have to be."""
    for _ in range(count):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _wait_as_spare(_moved(theirs), parent)
        theirs.close()
        _spares.append((pid, _moved(ours)))
    if count:
        subprocess.Popen = _Popen  # type: ignore[assignment, misc]


def _moved(channel: socket.socket) -> socket.socket:
    """The same at a number that no command uses."""
    with channel:
        return socket.socket(fileno=fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, _OWN_DESCRIPTOR))


def _wait_as_spare(channel: socket.socket, parent: int) -> NoReturn:
    processes.die_with_parent(signal.SIGKILL, parent)
    _spares.clear()
    _close_all_but([channel.fileno()])
    message, descriptors, _, _ = socket.recv_fds(channel, _LARGEST_MESSAGE, _MOST_DESCRIPTORS)
    if not message:
        os._exit(0)
    processes.die_with_parent(0, parent)
    channel.send(b"taken")
    channel.close()
    _become(Command.received(message), descriptors)


def _close_all_but(kept: list[int]) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) < 3:
            os.dup2(nothing, int(name))
        elif int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:  # the one that listed them
                pass


def _take_place(command: Command, descriptors: list[int]) -> None:
    """What `subprocess` does before it executes a file."""
    moved = [os.dup2(one, _OWN_DESCRIPTOR + 100 + index) for index, one in enumerate(descriptors)]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, command.numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(command.cwd)
    os.environ.clear()
    os.environ.update(command.environment)
    for number in command.ignored:
        signal.signal(number, signal.SIG_IGN)
    if command.new_session:
        os.setsid()
    if command.before is not None:
        module, code, variables = command.before
        FunctionType(
            marshal.loads(code),
            vars(importlib.import_module(module)),
            closure=tuple(map(CellType, variables)),
        )()


def _needs_an_interpreter() -> bool:
    """Whether a new one would differ, by its environment or by the modules that it would find."""
    if os.environ.get("PYTHONHASHSEED", "0") != "0":
        return True
    names = {name for name in {*os.environ, *_fresh.environment} if name.startswith(_OF_THE_INTERPRETER)} - _SET_HERE
    if any(os.environ.get(name) != _fresh.environment.get(name) for name in names):
        return True
    folders = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), os.getcwd()]
    return any(_has_another(Path(folder), name) for folder in folders for name in _modules_in(folder))


def _modules_in(folder: str) -> set[str]:
    if not os.path.isdir(folder):
        return set()
    found = [entry for entry in os.listdir(folder) if entry.endswith((".py", ".so")) or "." not in entry]
    return {entry.partition(".")[0] for entry in found} & _fresh.names


def _has_another(folder: Path, name: str) -> bool:
    """Whether a new interpreter would import `name` from this folder, and this process has not."""
    imported = getattr(sys.modules[name], "__file__", None)
    is_module = (folder / name / "__init__.py").is_file() or any(folder.glob(f"{name}.*"))
    return is_module and not (imported and Path(imported).is_relative_to(folder))


def _set_up_python(command: Command, module: str) -> None:
    """What an interpreter does at its start."""
    import numpy
    import torch

    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    is_safe = "-P" in command.arguments or bool(os.environ.get("PYTHONSAFEPATH"))
    if not is_safe or sys.version_info < (3, 11):  # Python 3.10 knows neither
        path.insert(0, os.path.dirname(module) if module.endswith(".py") else os.getcwd())
    sys.path[:] = [*path, *_fresh.path]
    sys.orig_argv = list(command.arguments)
    os.environ.update({**_fresh.of_imports, **os.environ})
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or _fresh.threads))


class _Popen(subprocess.Popen[Any]):
    """Starts processes of this package from the spares, any other and all after them as usual."""

    def _execute_child(self, *values: Any) -> None:
        given = dict(zip(_PARAMETERS, values, strict=True))
        before = _sendable(given["preexec_fn"])
        if not _spares or not _is_plain(given) or (given["preexec_fn"] and before is None):
            _EXECUTE_CHILD(self, *values)
            return
        pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        descriptors = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        passed = sorted(int(descriptor) for descriptor in given["pass_fds"])
        command = Command(
            [os.fspath(argument) for argument in given["args"]],
            dict(os.environ if given["env"] is None else given["env"]),
            os.fspath(given["cwd"] or os.getcwd()),
            [0, 1, 2, *passed],
            given["start_new_session"],
            before,
            [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN],
        )
        self.pid, channel = _spares.pop()
        with channel:
            socket.send_fds(channel, [command.message()], [*descriptors, *passed])
            channel.recv(16)
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))  # type: ignore[attr-defined]


def _is_plain(given: Mapping[str, Any]) -> bool:
    unset = {"executable": None, "shell": False, "close_fds": True, "gid": None, "gids": None, "uid": None, "umask": -1}
    arguments = given["args"]
    return (
        all(given[name] == value for name, value in unset.items())
        and isinstance(arguments, list)
        and arguments[0] == sys.executable
        and bool(_parse(arguments)[0])
    )


def _sendable(function: Callable[[], object] | None) -> tuple[str, bytes, list[Any]] | None:
    if not isinstance(function, FunctionType):
        return None
    return (
        function.__module__,
        marshal.dumps(function.__code__),
        [one.cell_contents for one in function.__closure__ or ()],
    )


# In the process of pytest.

_SCRIPT = """#!{interpreter} -IS
import os, pickle, socket, sys
channel = socket.socket(fileno=int(os.environ.pop("{variable}")))
arguments = [*{python}, "-m", "trainer", *sys.argv[1:]]
message = pickle.dumps({{"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}})
socket.send_fds(channel, [message], [0, 1, 2])
channel.recv({largest})
sys.exit(pickle.loads(channel.recv({largest})) & 0xFF)
"""
_CHANNEL_VARIABLE = "WARM_CHANNEL"


class Warm:
    """The server of this process, started with the first command."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m trainer ARGUMENT...` as `subprocess.run` does; its standard input is empty.

        Raises:
            subprocess.TimeoutExpired: It was killed, with all that it had started.
        """
        command = [sys.executable, "-m", "trainer", *arguments]
        channel = self._started()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors, open(os.devnull) as nothing:
            message = Command(command, dict(environment), str(cwd)).message()
            socket.send_fds(channel, [message], [file.fileno() for file in (nothing, out, errors)])
            pid = pickle.loads(channel.recv(_LARGEST_MESSAGE))
            channel.settimeout(timeout_s)
            try:
                code = pickle.loads(channel.recv(_LARGEST_MESSAGE))
            except TimeoutError:
                processes.kill_tree(pid)
                channel.settimeout(None)
                channel.recv(_LARGEST_MESSAGE)
                raise subprocess.TimeoutExpired(command, timeout_s, _text(out), _text(errors)) from None
            finally:
                channel.settimeout(None)
            return subprocess.CompletedProcess(command, code, _text(out), _text(errors))

    def shell(
        self, command: str, environment: Mapping[str, str], cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of bash, in which `trainer` is a command as of `run`; not two at once."""
        channel = self._started()
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "trainer"
            script.write_text(
                _SCRIPT.format(
                    python=_PYTHON, interpreter=sys.executable, variable=_CHANNEL_VARIABLE, largest=_LARGEST_MESSAGE
                )
            )
            script.chmod(0o755)
            path = os.pathsep.join([folder, environment["PATH"]])
            try:
                return subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", command],
                    cwd=cwd,
                    env={**environment, "PATH": path, _CHANNEL_VARIABLE: str(channel.fileno())},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=timeout_s,
                    check=False,
                    pass_fds=[channel.fileno()],
                )
            except subprocess.TimeoutExpired:
                self.end()
                raise

    def left(self) -> list[int]:
        """What commands have left behind."""
        return processes.descendants(self._server.pid) if self._server else []

    def end(self) -> None:
        """End the server, and what it still runs."""
        if self._server is not None and self._channel is not None:
            self._channel.close()
            processes.kill_tree(self._server.pid)
            self._server.wait()
        self._server = self._channel = None

    def _started(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._server = subprocess.Popen(
                    [*_PYTHON, __file__, str(theirs.fileno()), str(os.getpid())],
                    env={**_environment(), "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            atexit.register(self.end)
        return self._channel


WARM = Warm()


def _environment() -> dict[str, str]:
    from tests.conftest import MARK, clean_environment

    kept = clean_environment()
    return {name: value for name, value in kept.items() if name not in (MARK, "PYTHONPATH", "PYTHONSAFEPATH")}


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
