"""A fork server around torchrun: `python trainer/supervise/agent.py`, with the arguments of torchrun.

Importing torch and Lightning is most of the start of a rank, and ranks of a node that import at the same time compete
for cores and for the file system. So this process imports once what all ranks need (TRAINER_PRELOAD), and forks
torchrun and then each rank that torchrun starts or restarts:

    this process ──┬── torchrun: rendezvous and restarts; requests ranks over a pipe, and receives their exit codes
                   ├── rank 0
                   └── rank 1 ...

It has no Python threads and has not initialised CUDA, which do not survive a fork. If an import does either, torchrun
runs in this process and starts its ranks as usual.

torch's public API was measured and rejected: `elastic_launch` with `start_method="forkserver"` and a preload list. Its
start takes 1.35 to 1.55 times the CPU time (benchmarks/results/start.md), because it imports torch twice, in the
elastic agent and in the fork server. It still needs code around it:

- The fork server does not die with its parent, because the ranks keep its "alive" pipe open.
- Ranks need setsid, their own atexit and traceback, and a reset of the default start method, or the workers of a
  DataLoader would not be forked.
- The preload list takes importable names only, hides an ImportError, and does not report an import that opens a GPU.
- The first restart imports torch._dynamo, 1.7 s of CPU: torch's log formatter does so for a record with an exception.

The parts of torch that both ways use are the same in 2.11 and 2.13.

Run by file, not as a module: the code snapshot of a run comes before the installed package and may be older than this
file (tests/cli/test_lifecycle.py resumes one without it). So this file imports nothing from the package except the
module in TRAINER_PRELOAD.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PRELOAD_VARIABLE = "TRAINER_PRELOAD"
"""Module to import for all ranks; unset or empty: each rank is a new process."""
RENDEZVOUS_BACKEND = "trainer"
"""Name under which torchrun finds the rendezvous of this file."""
LISTENER_VARIABLE = "TRAINER_LISTENER"
"""Descriptor of the listening socket of the job's server, on the first of several nodes."""
TOKEN_VARIABLE = "TRAINER_STORE_TOKEN"
"""Prefix of the keys in that server."""
IMPORT_S_VARIABLE = "TRAINER_IMPORT_S"
"""Seconds that this process spent importing, for the ranks of the first attempt; read by
`trainer/runtime/heartbeat.py`."""
AHEAD_VARIABLE = "TRAINER_AHEAD"
"""Descriptor of the socket on which a process that was started ahead of its job waits for it."""
FROZEN_VARIABLE = "TRAINER_FROZEN_CODE"
"""`VARIABLE` of `trainer/runtime/frozen.py`."""
_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables that are read when a GPU is opened."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
"""Options of prctl(2)."""
_LIBC = ctypes.CDLL(None)
_ACCELERATORS = ("/dev/nvidia-uvm", "/dev/dxg", "/dev/kfd")
"""Devices that are open in a process that has initialised CUDA (the second under WSL) or ROCm. Counting GPUs with NVML
does not open them."""

Main = Callable[[], object]


def main() -> None:
    """Import, then be the fork server, torchrun or a rank, depending on the side of the fork."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 inserts the folder of this file
        sys.path.pop(0)
    began, before = time.monotonic(), dict(os.environ)
    channel = os.environ.pop(AHEAD_VARIABLE, None)
    obstacle = _import_all(os.environ.pop(PRELOAD_VARIABLE, ""))
    import_s = time.monotonic() - began
    if channel is not None:
        import_s = min(import_s, take_over(int(channel), before, is_usable=obstacle is None))
    from torch.distributed.run import main as torchrun

    _register_rendezvous()

    if obstacle is None:
        ForkServer(import_s).serve(torchrun)()
        return
    if obstacle:
        print(f"each rank imports torch for itself: {obstacle}", flush=True)
    torchrun()


def take_over(channel: int, before: dict[str, str], is_usable: bool) -> float:
    """Wait for the job of a process that was started ahead of it (`trainer/supervise/ahead.py`), and prepare for it.

    Becomes a new process by exec if that one could import something else: its environment differs, or the code of the
    job has a module under the name of one that is imported.

    Args:
        channel: The socket on which the job comes.
        before: The environment in which this process has imported.
        is_usable: Whether ranks can be forked.

    Returns:
        Seconds for which the job had to wait.
    """
    with socket.socket(fileno=channel) as waits:
        header, descriptors, _, _ = socket.recv_fds(waits, 8, 2)
        if len(header) < 8:
            os._exit(0)
        with waits.makefile("rb") as stream:
            job = json.loads(stream.read(int.from_bytes(header, "big")))
    for descriptor, standard in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    arguments, environment = job["arguments"], job["environment"]
    frozen = [folder for folder in environment.get(FROZEN_VARIABLE, "").split(os.pathsep) if folder]
    reason = _differing(before, environment) or _shadowing(frozen) if is_usable else "ranks cannot be forked"
    if reason:
        print(f"imports again for this job: {reason}", flush=True)
        os.execve(arguments[0], arguments, environment)
    guessed = before.get(FROZEN_VARIABLE, "").split(os.pathsep)
    sys.path[:] = frozen + [entry for entry in sys.path if entry not in guessed]
    of_imports = {name: value for name, value in os.environ.items() if name not in before}
    os.environ.clear()
    os.environ.update({**of_imports, **environment})
    del os.environ[PRELOAD_VARIABLE]
    sys.argv = arguments[1:]
    importlib.import_module("trainer.runtime.frozen").install()
    return max(0.0, time.time() - float(job["time"]))


def _differing(before: dict[str, str], environment: dict[str, str]) -> str | None:
    """Return a variable that imports may read and that has another value now."""
    late = ("PYTHONPATH", *_DEVICES)
    names = [name for name in before.keys() | environment.keys() if before.get(name) != environment.get(name)]
    read = [name for name in names if name not in late and not name.startswith("TRAINER_")]
    if PRELOAD_VARIABLE in names:
        read.append(PRELOAD_VARIABLE)
    return f"{min(read)} differs" if read else None


def _shadowing(folders: list[str]) -> str | None:
    """Return a module or package of the code snapshot that has the name of an imported one."""
    imported = {name.partition(".")[0] for name in sys.modules}
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            is_package = os.path.isfile(os.path.join(folder, name, "__init__.py"))
            if name.partition(".")[0] in imported and (is_package or name.endswith((".py", ".so"))):
                return f"its code has {name}"
    return None


def _import_all(module: str) -> str | None:
    """Import torchrun and `module`.

    The garbage collector is disabled: with it, importing torchrun alone takes 2.2 s of CPU instead of 1.3 s.

    Returns:
        None when ranks can be forked now, else the reason why not; "" without a module to import.
    """
    gc.disable()
    try:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2)  # shows where an import hangs
        if not module or not sys.platform.startswith("linux"):
            importlib.import_module("torch.distributed.run")
            return ""
        with _module_of_imports().quick_imports():
            importlib.import_module("torch.distributed.run")
            from torch.distributed.elastic.multiprocessing import api

            if not hasattr(api, "get_subprocess_handler"):
                return "this version of torch starts its workers in another way"
            importlib.import_module(module)
        # Native threads of OpenBLAS do not count: it stops them before a fork.
        return "importing started a thread" if threading.active_count() > 1 else cannot_fork(Path("/proc/self"))
    except Exception as error:  # each rank will raise it as well, and log it
        return f"{type(error).__name__}: {error}"
    finally:
        gc.freeze()
        gc.enable()


def _module_of_imports() -> Any:
    try:
        return importlib.import_module("trainer.runtime.imports")
    except ModuleNotFoundError:  # the code snapshot has the package from before 0.2
        return importlib.import_module("trainer.worker.imports")


def cannot_fork(process: Path) -> str | None:
    """Return why the process with this folder under /proc cannot be forked; None if it can."""
    for descriptor in (process / "fd").iterdir():
        try:
            device = os.readlink(descriptor)
        except OSError:  # the descriptor that reads this folder
            continue
        if device in _ACCELERATORS:
            return f"importing opened {device}"
    return None


def _register_rendezvous() -> None:
    """Give torchrun a rendezvous whose nodes are numbered by the launcher.

    torch's own ones listen on every interface, and `c10d` also loads a pickle from its store and numbers the nodes by
    their names.
    """
    from torch.distributed import HashStore, PrefixStore, Store, TCPStore
    from torch.distributed.elastic import rendezvous as elastic

    class Fixed(elastic.RendezvousHandler):
        """One node: a store in this process. Several: a server on the first, which the ranks use as well."""

        def __init__(self, parameters: elastic.RendezvousParameters) -> None:
            self._parameters = parameters
            self._rank = int(parameters.config["rank"])
            self._round = 0
            self._store: Store = HashStore()
            self._address, self._port = "127.0.0.1", 0
            if self.use_agent_store:
                host, _, port = parameters.endpoint.rpartition(":")
                self._address, self._port = host.strip("[]"), int(port)
                self._store = self._connect()

        def _connect(self) -> TCPStore:
            listener = os.environ.pop(LISTENER_VARIABLE, None)
            if (listener is not None) != (self._rank == 0):
                raise RuntimeError("node 0 has to be the server of the job, and no other node")
            timeout = timedelta(seconds=float(self._parameters.get("timeout", 600)))
            if listener is None:
                return TCPStore(self._address, self._port, timeout=timeout)
            return TCPStore(self._address, self._port, is_master=True, timeout=timeout, master_listen_fd=int(listener))

        @property
        def use_agent_store(self) -> bool:
            return bool(self._parameters.max_nodes > 1)

        def next_rendezvous(self) -> elastic.RendezvousInfo:
            self._round += 1
            prefix = f"{os.environ.get(TOKEN_VARIABLE, '')}/{self.get_run_id()}/{self._round}"
            # Only ranks of a package from before 0.3 use the port on one node.
            place = elastic.RendezvousStoreInfo(self._address, self._port or _free_port())
            nodes = self._parameters.max_nodes
            return elastic.RendezvousInfo(PrefixStore(prefix, self._store), self._rank, nodes, place)

        def get_backend(self) -> str:
            return RENDEZVOUS_BACKEND

        def get_run_id(self) -> str:
            return str(self._parameters.run_id)

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def shutdown(self) -> bool:
            return True

    elastic.rendezvous_handler_registry.register(RENDEZVOUS_BACKEND, Fixed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ForkServer:
    """Forks torchrun and the ranks that it requests, waits for them, and exits as torchrun exits."""

    def __init__(self, import_s: float) -> None:
        from multiprocessing import Pipe  # imported here because the command line imports this file for a constant

        self._import_s = import_s
        self._pid = os.getpid()
        self._pipe, self._torchruns_end = Pipe()
        self._woken, self._wakes = os.pipe()
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)

    def serve(self, torchrun: Main) -> Main:
        """Fork, and return what this process has to run: torchrun, a rank, or in the server an exit like torchrun's."""
        sys.stdout.flush()
        sys.stderr.flush()
        agent = os.fork()
        if agent == 0:
            _die_with(self._pid)
            self._leave_server()
            _fork_ranks_through(self._torchruns_end)
            return lambda: _run_to_the_end(torchrun)
        self._torchruns_end.close()
        listener = os.environ.pop(LISTENER_VARIABLE, None)
        if listener is not None:  # torchrun's, not that of the ranks
            os.close(int(listener))
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
                except (EOFError, OSError):  # torchrun is exiting
                    sources.remove(self._pipe)
                    continue
                rank = self._start(*request)
                if rank is not None:
                    return rank

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Main | None:
        """Fork a rank. Returns what it runs in the rank, None in this process."""
        ready, not_yet = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell("failed", error.errno or 0, error.strerror)
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
            self._tell("started", pid, 0)
        return None

    def _leave_server(self) -> None:
        """Reset signal handling and close the server's descriptors, in a process that was just forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._pipe.close()
        os.close(self._woken)
        os.close(self._wakes)

    def _tell(self, what: str, number: int, detail: object) -> None:
        try:
            self._pipe.send((what, number, detail))
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
        self._pipe.send((arguments, environment))
        while True:
            what, number, detail = self._pipe.recv()
            if what == "failed":
                raise OSError(number, detail)
            if what == "started":
                self._codes.pop(number, None)  # of an earlier process with the same id
                return int(number)
            self._codes[number] = detail

    def code(self, pid: int, timeout_s: float | None) -> int | None:
        """Return the exit code of a rank; None if it has not ended within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pid not in self._codes:
            if not self._pipe.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None
            _, ended, code = self._pipe.recv()
            self._codes[ended] = code
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


if __name__ == "__main__":
    main()
