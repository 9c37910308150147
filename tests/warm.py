"""Starts Python processes for the tests by fork instead of exec: most of their CPU time would be `import torch`.

One process imports it once for a process of pytest. Whatever the tests, and the commands that they run, start with
`subprocess` from then on is a fork of it, if it is Python and runs code of this repository:

    pytest ──┬── server: has imported torch and this package, has no threads
             └── trainer fit ... ──┬── server: forked before the command began, so knows nothing of it
                                   └── node ──┬── server
                                              └── agent.py ── rank

A server forks twice and the one in between ends, so that the new process becomes a child of the nearest subreaper: that
is who asked for it, for as long as it waits for the answer. So process ids, parents, process groups, signals,
descriptors, environment variables, command lines, limits and exit codes are those of executed processes. More modules
are imported, and `sys.flags` are the server's.

Executed as usual is what only a new interpreter can do (another hash seed, a module of the project with the name of an
imported one), what a SLURM job starts, and all that tests start whose point is the start of a process or what it
imports: `@pytest.mark.executed`. With `--executed` everything is.
"""

from __future__ import annotations

import atexit
import contextlib
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
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CellType, FunctionType, ModuleType
from typing import Any, NoReturn

from trainer.core import processes
from trainer.supervise.fork_server import keep_operators

PRELOADED = (
    "trainer.train.run",
    "trainer.cli.fit",
    "trainer.cli.launching",
    "trainer.supervise.supervisor",
    "trainer.report.write",
    "torch.distributed.run",
    # What most commands and ranks import next.
    "trainer.cli.approval",
    "trainer.cli.check",
    "trainer.cli.plan",
    "trainer.cli.resume",
    "trainer.cli.sweep_follow",
    "trainer.cli.sweep_launch",
    "trainer.cli.sweep_verbs",
    "trainer.cli.time",
    "trainer.config.unknown_keys",
    "trainer.config.own_keys",
    "trainer.config.retarget",
    "trainer.plan.run",
    "trainer.runs.manifest",
    "numpy.ma",
    "torch.profiler",
    "trainer.data.digits",
    "trainer.models.mlp",
    "trainer.schedules",
    "trainer.slurm.submit",
    "trainer.sweeps.arrays",
    "trainer.tasks.classification",
)
IMPORTING = {"bench", "check", "doctor", "evaluate", "export", "fit", "plan", "predict", "repro", "resume", "sweep"}
IMPORTING |= {"time", "verify-resume"}
"""Verbs of `trainer` that import torch, or start what does."""
ROOT = Path(__file__).resolve().parents[1]
MARK = "TRAINER_TEST_MARK"
"""In the environment of every process that a test starts, and of all that those start: 32 characters."""
_AGENT = "supervise/agent.py"
"""It forks what it starts by itself."""
_PR_SET_CHILD_SUBREAPER = 36
_PRCTL = ctypes.CDLL(None).prctl
_LARGEST_MESSAGE, _MOST_DESCRIPTORS, _OWN_DESCRIPTOR = 1 << 17, 100, 500
_LONGEST_COMMAND_LINE = 4096
_OF_THE_INTERPRETER = ("PYTHON", "LC_", "LANG", "LD_", "OMP_WAIT_POLICY", "MALLOC_")
_SET_HERE = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONHASHSEED"}
_LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]
_PYTHON = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
_executed = subprocess.Popen
_EXECUTE_CHILD = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_PARAMETERS = list(inspect.signature(_EXECUTE_CHILD).parameters)[1:]


@dataclass(frozen=True)
class Command:
    """`python ARGUMENT...`, and what a process inherits; its descriptors are sent beside it, then that of the reply."""

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
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    umask: int | None = None
    is_relayed: bool = False
    """Whether who asks is not above the server, and so gets the exit code through the reply, not a child."""

    def message(self) -> bytes:
        return pickle.dumps(vars(self))

    @staticmethod
    def received(message: bytes) -> Command:
        return Command(**pickle.loads(message))


# In a server, and in what it forks.


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


def serve(number: int, parent: int) -> NoReturn:
    """Fork a process for each command that comes through the socket `number`."""
    processes.die_with_parent(signal.SIGKILL, parent)
    if sys.version_info < (3, 11):
        sys.path.pop(0)  # the folder of this file
    _import()
    _answer(socket.socket(fileno=number))


def _import() -> None:
    from trainer.runtime.imports import quick_imports

    before = set(os.environ)
    with quick_imports():
        for name in PRELOADED:
            importlib.import_module(name)
    import torch

    from trainer.config.compose import compose
    from trainer.launch import local

    compose(["model=mlp", "data=digits"], config_dirs=[])  # finds Hydra's plugins, reads and parses the shipped files
    local.start_ahead = lambda config: None  # what it would import is here
    global _fresh
    names = frozenset(name.partition(".")[0] for name in sys.modules)
    of_imports = {name: value for name, value in os.environ.items() if name not in before}
    _fresh = _Fresh(dict(os.environ), list(sys.path), names, of_imports, torch.get_num_threads())
    assert threading.active_count() == 1
    keep_operators()
    gc.collect()
    gc.freeze()


_OF_A_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
"""Signals that a command may get with its process group and outlive; so does its server."""


def _answer(channel: socket.socket) -> NoReturn:
    """Fork until who asks has ended."""
    for signum in _OF_A_GROUP:
        signal.signal(signum, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _LARGEST_MESSAGE, _MOST_DESCRIPTORS)
        if not message:
            os._exit(0)
        command = Command.received(message)
        between = os.fork()
        if between == 0:
            channel.close()
            between = os.getpid()
            pid = os.fork()
            if pid == 0:
                while os.getppid() == between and not command.is_relayed:
                    os.sched_yield()
                _become(command, descriptors)
            if command.is_relayed:
                _relay(pid, descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        if command.is_relayed:
            os.waitpid(-1, os.WNOHANG)  # an earlier one
        else:
            os.waitpid(between, 0)


def _relay(pid: int, descriptors: list[int]) -> None:
    for descriptor in descriptors[:-1]:
        os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        os.write(descriptors[-1], str(code & 0xFF).encode())


def _become(command: Command, descriptors: list[int]) -> NoReturn:
    """Run the command in this process, which has just been forked from a server."""
    code = 1
    try:
        _take_place(command, descriptors)
        module, arguments = _parse(command.arguments)
        if not module or _needs_an_interpreter(module):
            os.execve(command.arguments[0], command.arguments, os.environ)
        if not module.endswith(_AGENT):
            server = _forked_server()
            _start_through(lambda: server)
        _set_up_python(command, module)
        code = _run(module, arguments)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        os._exit(code & 0xFF)


def _run(module: str, arguments: list[str]) -> int:
    """The exit code."""
    sys.argv = [module, *arguments]
    try:
        if module == "-c":
            sys.argv = [module, *arguments[1:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(arguments[0], "<string>", "exec"), vars(main))
        elif module.endswith(".py"):
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
    """The module, file or "-c" that `python ARGUMENT...` runs, and its arguments; "" if a fork would not pay.

    It takes 0.1 s of CPU, and so more than a command that imports no torch and starts nothing that does.
    """
    rest = list(arguments[1:])
    while rest[:1] in (["-P"], ["-u"]):
        rest.pop(0)
    if rest[:1] == ["-m"] and rest[1].partition(".")[0] in ("trainer", "tests"):
        return ("", []) if rest[1] == "trainer" and not IMPORTING.intersection(rest[2:3]) else (rest[1], rest[2:])
    if rest[:1] == ["-c"] and any(name in rest[1] for name in ("trainer", "torch", "lightning")):
        return "-c", rest[1:]
    if rest and rest[0].endswith(".py") and (Path(rest[0]).is_relative_to(ROOT) or rest[0].endswith(_AGENT)):
        return rest[0], rest[1:]
    return "", []


def _forked_server() -> socket.socket:
    """A server for what this process will start, forked while this one is as new as those have to be."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork() == 0:
        processes.die_with_parent(signal.SIGKILL, parent)
        channel = _moved(theirs)
        _close_all_but([channel.fileno()])
        _answer(channel)
    theirs.close()
    return _moved(ours)


def _moved(channel: socket.socket) -> socket.socket:
    """The same at a number that no command uses."""
    with channel:
        return socket.socket(fileno=fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, _OWN_DESCRIPTOR))


def _close_all_but(kept: list[int]) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) < 3:
            os.dup2(nothing, int(name))
        elif int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def _take_place(command: Command, descriptors: list[int]) -> None:
    """What `subprocess` does before it executes a file; then say so."""
    moved = [os.dup2(one, _OWN_DESCRIPTOR + 100 + index) for index, one in enumerate(descriptors)]
    for descriptor in descriptors:
        os.close(descriptor)
    reply = moved.pop()
    os.set_inheritable(reply, False)
    for descriptor, number in zip(moved, command.numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(command.cwd)
    os.environ.clear()
    os.environ.update(command.environment)
    for signum in _OF_A_GROUP:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    for signum in command.ignored:
        signal.signal(signum, signal.SIG_IGN)
    for limit, values in command.limits.items():
        if resource.getrlimit(limit) != values:
            resource.setrlimit(limit, values)
    if command.umask is not None:
        os.umask(command.umask)
    if command.new_session:
        os.setsid()
    if command.before is not None:
        module, code, variables = command.before
        FunctionType(
            marshal.loads(code),
            vars(importlib.import_module(module)),
            closure=tuple(map(CellType, variables)),
        )()
    _show(command)
    if not command.is_relayed:
        os.write(reply, str(os.getpid()).encode())
    os.close(reply)


def _show(command: Command) -> None:
    """Write the command line and the mark of its test to where /proc reads those that this process began with."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arguments, arguments_end, variables, variables_end = (int(value) for value in stat[45:49])  # proc_pid_stat(5)
    text = b"\0".join(os.fsencode(argument) for argument in command.arguments)[: arguments_end - arguments - 1]
    ctypes.memset(arguments, 0, arguments_end - arguments)
    ctypes.memmove(arguments, text, len(text))
    place = ctypes.string_at(variables, variables_end - variables).find(f"{MARK}=".encode())
    if place >= 0:
        mark = command.environment.get(MARK, "").encode().ljust(32, b"-")[:32]
        ctypes.memmove(variables + place + len(MARK) + 1, mark, 32)


def _needs_an_interpreter(module: str) -> bool:
    """Whether a new one would differ, by its environment or by the modules that it would find."""
    if os.environ.get("PYTHONHASHSEED", "0") != "0":
        return True
    names = {name for name in {*os.environ, *_fresh.environment} if name.startswith(_OF_THE_INTERPRETER)} - _SET_HERE
    if any(os.environ.get(name) != _fresh.environment.get(name) for name in names):
        return True
    folders = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), os.getcwd()]
    if module.endswith(".py"):
        folders.append(os.path.dirname(module))
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
    sys.path[:] = dict.fromkeys([*path, *_fresh.path])
    is_safe = "-P" in command.arguments or bool(os.environ.get("PYTHONSAFEPATH"))
    if not is_safe or sys.version_info < (3, 11):  # Python 3.10 knows neither
        of_module = "" if module == "-c" else os.path.dirname(module) if module.endswith(".py") else os.getcwd()
        sys.path.insert(0, of_module)
    sys.orig_argv = list(command.arguments)
    os.environ.update({**_fresh.of_imports, **os.environ})
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()
    threads = int(os.environ.get("OMP_NUM_THREADS") or _fresh.threads)
    if threads != torch.get_num_threads():  # it starts threads
        torch.set_num_threads(threads)


# In whoever starts processes.

_server: Callable[[], socket.socket] | None = None
_owner = 0
_asking = threading.Lock()


def _start_through(server: Callable[[], socket.socket] | None) -> None:
    """Let this process start what it starts through a server, and not what it forks; None: as usual."""
    global _server, _owner
    _server, _owner = server, os.getpid()
    subprocess.Popen = _Popen  # type: ignore[assignment, misc]


class _Popen(_executed[Any]):
    """Starts Python processes of this repository through the server, any other as usual."""

    def _execute_child(self, *values: Any) -> None:
        given = dict(zip(_PARAMETERS, values, strict=True))
        pid = _forked(given) if _server is not None and os.getpid() == _owner and _is_plain(given) else None
        if pid is None:
            _EXECUTE_CHILD(self, *values)
            return
        self.pid = pid
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))  # type: ignore[attr-defined]


def _forked(given: Mapping[str, Any]) -> int | None:
    """The process id; None if it has to be executed."""
    before = _sendable(given["preexec_fn"])
    if given["preexec_fn"] and before is None:
        return None
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
        {limit: resource.getrlimit(limit) for limit in _LIMITS},
        _umask(),
    )
    assert _server is not None
    with _asking:
        return _ask(_server(), command.message(), [*descriptors, *passed])


def _umask() -> int:
    """Of this process, read where reading it does not set it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))
    return int(line.split()[1], 8)


def _ask(channel: socket.socket, message: bytes, descriptors: list[int]) -> int | None:
    """Have the server start a command as a child of this process; None if it could not."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        _PRCTL(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            socket.send_fds(channel, [message], [*descriptors, theirs.fileno()])
            theirs.close()
            reply = ours.recv(16)
        except OSError:
            return None
        finally:
            _PRCTL(_PR_SET_CHILD_SUBREAPER, 0)
    return int(reply) if reply else None


def _is_plain(given: Mapping[str, Any]) -> bool:
    unset = {"executable": None, "shell": False, "close_fds": True, "gid": None, "gids": None, "uid": None, "umask": -1}
    arguments = given["args"]
    return (
        all(given[name] == value for name, value in unset.items())
        and given.get("process_group", -1) == -1
        and isinstance(arguments, list)
        and arguments[:1] == [sys.executable]
        and bool(_parse([os.fspath(argument) for argument in arguments])[0])
        and (given["cwd"] is None or os.path.isdir(given["cwd"]))
    )


def _sendable(function: Callable[[], object] | None) -> tuple[str, bytes, list[Any]] | None:
    if not isinstance(function, FunctionType) or not function.__module__.startswith("trainer."):
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
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
command = {{"arguments": [*{python}, "-m", "trainer", *sys.argv[1:]], "is_relayed": True}}
message = pickle.dumps({{**command, "environment": dict(os.environ), "cwd": os.getcwd()}})
socket.send_fds(channel, [message], [0, 1, 2, theirs.fileno()])
theirs.close()
sys.exit(int(ours.recv(16)))
"""
_CHANNEL_VARIABLE = "WARM_CHANNEL"


class Warm:
    """The server of this process, started with the first command."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def switch(self, on: bool) -> None:
        """Have processes forked from now on, or executed."""
        _start_through(self._started if on else None)

    def shell(
        self, command: str, environment: Mapping[str, str], cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of bash, in which `trainer` is forked.

        Raises:
            subprocess.TimeoutExpired: It was killed, with all that it had started.
        """
        channel = self._started()
        line = ["bash", "-euo", "pipefail", "-c", command]
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "trainer"
            script.write_text(_SCRIPT.format(python=_PYTHON, interpreter=sys.executable, variable=_CHANNEL_VARIABLE))
            script.chmod(0o755)
            path = os.pathsep.join([folder, environment["PATH"]])
            with subprocess.Popen(
                line,
                cwd=cwd,
                env={**environment, "PATH": path, _CHANNEL_VARIABLE: str(channel.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[channel.fileno()],
            ) as shell:
                try:
                    output, errors = shell.communicate(timeout=timeout_s)
                except subprocess.TimeoutExpired:
                    processes.kill_tree(shell.pid)
                    self.end()  # and what it runs for the shell
                    raise
            return subprocess.CompletedProcess(line, shell.returncode, output, errors)

    def end(self) -> None:
        """End the server."""
        if self._process is not None and self._channel is not None:
            self._channel.close()
            processes.kill_tree(self._process.pid)
            self._process.wait()
        self._process = self._channel = None

    def _started(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = _executed(
                    [*_PYTHON, __file__, str(theirs.fileno()), str(os.getpid()), " " * _LONGEST_COMMAND_LINE],
                    env={**_environment(), MARK: "-" * 32, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            atexit.register(self.end)
        return self._channel


WARM = Warm()


def _environment() -> dict[str, str]:
    from tests.conftest import clean_environment

    return {name: value for name, value in clean_environment().items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
