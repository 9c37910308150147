"""The environment of a rank: what torchrun and the ranks see that the node process does not.

torchrun adds RANK, LOCAL_RANK, WORLD_SIZE and its own variables; the table in docs/architecture.md ("Processes of a
node") has the rest. A rank reads them in `runtime/process.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.config.hydra_record import env_set
from trainer.config.shape import LaunchShape
from trainer.core.hardware import usable_cores
from trainer.core.network import loopback_interface
from trainer.runs.code_snapshot import import_paths
from trainer.runs.node_folder import NODE_FOLDER_VARIABLE
from trainer.runtime.process import FULL_MESH_UP_TO, STORE_VARIABLE
from trainer.supervise import rendezvous
from trainer.supervise.agent import LISTENER_VARIABLE, PRELOAD_VARIABLE, TOKEN_VARIABLE
from trainer.supervise.rendezvous import Place


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """What Python starts with in torchrun and in the ranks."""

    code_dir: Path
    """Code snapshot of the run."""
    preload: str | None = None
    """Module that is imported once for all ranks. While it is imported, no code may start a thread, use a GPU or read
    the number of its rank."""
    hash_seed: str = "0"
    """PYTHONHASHSEED (`RunDirectory.hash_seed`). Forked ranks have that of the process that forks them."""
    expandable_segments: bool = False
    """`trainer.expandable_segments`."""


def environment(
    inherited: Mapping[str, str],
    python: Interpreter,
    shape: LaunchShape,
    place: Place,
    *,
    attempt: int,
    store: Path | None = None,
) -> dict[str, str]:
    """Return the environment of torchrun, which the workers inherit.

    Args:
        inherited: Environment of this process.
        python: What Python starts with.
        shape: Launch shape.
        place: Position of this node.
        attempt: Number of the first attempt.
        store: Private folder of this node (`rendezvous.private_folder`): the ranks of a single node find each other
            there, those of several exchange files with their node process.
    """
    inherited = {**inherited, **env_set(python.code_dir.parent)}
    variables = dict(inherited)
    variables["PYTHONHASHSEED"] = python.hash_seed
    threads = max(1, usable_cores(inherited) // shape.processes_per_node)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables["TRAINER_ATTEMPT"] = str(attempt)
    variables["PYTHONUNBUFFERED"] = "1"
    # With a shared store, restarted ranks read the addresses of dead ranks and never connect (torch 2.13).
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # The code snapshot comes before the working directory, which may have changed since launch, and before editable
    # installs, which are last on sys.path. `python -m` would insert the working directory first; PYTHONSAFEPATH
    # prevents that since Python 3.11 (3.10: `process.frozen_code_first`).
    frozen = import_paths(python.code_dir)
    variables["TRAINER_FROZEN_CODE"] = os.pathsep.join(frozen)  # read by trainer/runtime/frozen.py
    paths = [*frozen, os.getcwd(), *filter(None, [inherited.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    variables["PYTHONSAFEPATH"] = "1"
    if python.expandable_segments and shape.device == "cuda":
        allow_expandable_segments(variables)
    for name in (STORE_VARIABLE, TOKEN_VARIABLE, LISTENER_VARIABLE, NODE_FOLDER_VARIABLE):  # of a job around this one
        variables.pop(name, None)
    if place.nodes > 1 and store is not None:
        variables[NODE_FOLDER_VARIABLE] = str(store)
    variables |= _network(inherited, place, store)
    if shape.world_size > FULL_MESH_UP_TO:
        variables.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if shape.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if python.preload:
        variables.setdefault(PRELOAD_VARIABLE, python.preload)
    return variables


def allow_expandable_segments(variables: dict[str, str]) -> None:
    """Set the CUDA allocator's `expandable_segments` in the environment of a process that has not used CUDA yet.

    A value that the user has set is kept whole: torch reads PYTORCH_CUDA_ALLOC_CONF first, and the two do not add up.
    """
    if not any(variables.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _network(inherited: Mapping[str, str], place: Place, store: Path | None) -> dict[str, str]:
    """Return the variables for the store of the ranks, and for the interfaces of gloo and NCCL."""
    if place.link is None:
        # On one node nothing listens outside of it, whatever the site has set for jobs on several. Besides, on a laptop
        # without a network the host name may not resolve, or to a foreign address.
        loopback = rendezvous.socket_variables(loopback_interface(), chosen=True)
        return loopback | ({STORE_VARIABLE: f"file:{store}"} if store else {})
    chosen = rendezvous.socket_variables(place.interface, chosen=True)
    found = rendezvous.socket_variables(place.link.own.interface, chosen=False)
    variables = chosen or {name: value for name, value in found.items() if name not in inherited}
    token = place.link.server.token
    variables |= {STORE_VARIABLE: f"tcp:{token}", TOKEN_VARIABLE: token}
    if place.link.listener is not None:
        variables[LISTENER_VARIABLE] = str(place.link.listener.fileno())
    return variables
