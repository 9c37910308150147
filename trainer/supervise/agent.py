"""Import torch once for a node: `python trainer/supervise/agent.py`, with the arguments of torchrun.

Importing torch and Lightning is most of the start of a rank, and ranks of a node that import at the same time compete
for cores and for the file system. So this process imports once what all ranks need (TRAINER_PRELOAD). It then forks
torchrun, and each rank that torchrun starts or restarts: `fork_server.py`.

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
module in TRAINER_PRELOAD, and `fork_server.py` by its path.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOAD_VARIABLE = "TRAINER_PRELOAD"
"""Module to import for all ranks; unset or empty: each rank is a new process."""
RENDEZVOUS_BACKEND = "trainer"
"""Name under which torchrun finds the rendezvous of this file."""
LISTENER_VARIABLE = "TRAINER_LISTENER"
"""Descriptor of the listening socket of the job's server, on the first of several nodes."""
TOKEN_VARIABLE = "TRAINER_STORE_TOKEN"
"""Prefix of the keys in that server."""
AHEAD_VARIABLE = "TRAINER_AHEAD"
"""Descriptor of the socket on which a process that was started ahead of its job waits for it."""
FROZEN_VARIABLE = "TRAINER_FROZEN_CODE"
"""`VARIABLE` of `trainer/runtime/frozen.py`."""
_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables that are read when a GPU is opened."""
_ACCELERATORS = ("/dev/nvidia-uvm", "/dev/dxg", "/dev/kfd")
"""Devices that are open in a process that has initialised CUDA (the second under WSL) or ROCm. Counting GPUs with NVML
does not open them."""


@dataclass(frozen=True, kw_only=True)
class TorchrunJob:
    """The job that `torchrun.start` sends to a process of this file that was started ahead of it.

    Both come from the same folder, so they are of one version. The package that this process has imported may be
    another one, so `trainer.core.records`, which writes the message, cannot read it here.
    """

    arguments: list[str]
    """The command line of a new process, with which this one is replaced if it has imported something else."""
    environment: dict[str, str]
    time: float
    """When it was sent, in seconds since 1970."""

    @classmethod
    def of(cls, text: bytes) -> TorchrunJob:
        """Return the job in a JSON text.

        Raises:
            ValueError: It is none.
        """
        try:
            job = cls(**json.loads(text))
            if all(isinstance(*pair) for pair in ((job.arguments, list), (job.environment, dict), (job.time, float))):
                return job
            raise TypeError("a field has a value of the wrong type")
        except (TypeError, ValueError) as error:
            raise ValueError(f"the message with the job cannot be used: {error}") from None


def main() -> None:
    """Import, then be the fork server, torchrun or a rank, depending on the side of the fork."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 inserts the folder of this file
        sys.path.pop(0)
    began, before = time.monotonic(), dict(os.environ)
    forks = _beside("fork_server")
    channel = os.environ.pop(AHEAD_VARIABLE, None)
    obstacle = _import_all(os.environ.pop(PRELOAD_VARIABLE, ""))
    import_s = time.monotonic() - began
    if channel is not None:
        import_s = min(import_s, take_over(int(channel), before, is_usable=obstacle is None))
    from torch.distributed.run import main as torchrun

    _register_rendezvous()

    if obstacle is None:
        forks.ForkServer(import_s, private_variable=LISTENER_VARIABLE).serve(torchrun)()
        return
    if obstacle:
        print(f"each rank imports torch for itself: {obstacle}", flush=True)
    torchrun()


def _beside(name: str) -> ModuleType:
    """Import a file beside this one: the package that is imported by name may be older, or absent."""
    spec = importlib.util.spec_from_file_location(f"_trainer_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its messages are pickled under this name
    spec.loader.exec_module(module)
    return module


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
            content = stream.read(int.from_bytes(header, "big"))
    for descriptor, standard in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    try:
        job = TorchrunJob.of(content)
    except ValueError as error:
        sys.exit(f"error: {error}")
    environment = job.environment
    frozen = [folder for folder in environment.get(FROZEN_VARIABLE, "").split(os.pathsep) if folder]
    reason = _differing(before, environment) or _shadowing(frozen) if is_usable else "ranks cannot be forked"
    if reason:
        print(f"imports again for this job: {reason}", flush=True)
        os.execve(job.arguments[0], job.arguments, environment)
    guessed = before.get(FROZEN_VARIABLE, "").split(os.pathsep)
    sys.path[:] = frozen + [entry for entry in sys.path if entry not in guessed]
    of_imports = {name: value for name, value in os.environ.items() if name not in before}
    os.environ.clear()
    os.environ.update({**of_imports, **environment})
    del os.environ[PRELOAD_VARIABLE]
    sys.argv = job.arguments[1:]
    importlib.import_module("trainer.runtime.frozen").install()
    return max(0.0, time.time() - job.time)


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
            # Only ranks of a package from before 0.2 use the port on one node.
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


if __name__ == "__main__":
    main()
