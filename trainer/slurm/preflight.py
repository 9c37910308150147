"""Check the nodes of an allocation before the first attempt: `python -m trainer.slurm.preflight RUN_DIR NODES`.

Each node checks itself, then all ranks all-reduce some megabytes. The results are in `preflight/JOB-RESTART/NODE.json`,
`judge` returns the nodes that must not be used, and `slow` those that are slower than they were. It takes less than a
minute.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from trainer.checkpoint.store import CheckpointStore
from trainer.config.shape import LaunchShape
from trainer.core import processes, records
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.files import write_atomic
from trainer.core.gpus import inventory
from trainer.core.hardware import count_gpus
from trainer.hardware import baseline
from trainer.runs.directory import RunDirectory
from trainer.runs.records import NodeCheck, Reduction
from trainer.runs.remote_checkpoints import url_of
from trainer.runtime.reduce_answer import told
from trainer.supervise import rendezvous
from trainer.supervise.rendezvous import Place

MOST_SKEW_S = 5.0
"""Largest clock difference; a larger one confuses which of two files is newer."""
LEAST_FREE_BYTES = 200_000_000
DEFAULT_TIMEOUT_S = 300
"""`cluster.preflight_timeout_s` of a run from before that option."""
POLL_S, READ_EVERY_S = 0.2, 2.0
_PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "hydra-core", "omegaconf")
_WORKER = "trainer.runtime.all_reduce_speed"


def folder(run: RunDirectory, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the results of this allocation."""
    restart = environment.get("SLURM_RESTART_COUNT") or 0
    return run.path / "preflight" / f"{environment['SLURM_JOB_ID']}-{restart}"


def check_node(run: RunDirectory, shape: LaunchShape, node: str) -> NodeCheck:
    """Check this node. Returns its problems, and what is compared with the other nodes."""
    problems = []
    if shape.device == "cuda" and (gpus := count_gpus()) < shape.processes_per_node:
        why = inventory().problem
        problems.append(
            f"{gpus} GPUs are usable, {shape.processes_per_node} are needed" + (f": {why.message}" if why else "")
        )
    probe = folder(run) / f".{node}"
    try:
        before = time.time()
        write_atomic(probe, node)
        written, after = probe.stat().st_mtime, time.time()
        probe.unlink()
        skew_s = max(before - written, written - after)  # so that a slow disk is not taken for a wrong clock
        if skew_s > MOST_SKEW_S:
            problems.append(f"its clock differs by {skew_s:.0f} s from the file system of the run directory")
    except OSError as error:
        problems.append(f"cannot write into the run directory: {error.strerror}")
    free = shutil.disk_usage(run.path).free
    needed = bytes_to_come(run)
    if free < needed:
        problems.append(f"{free / 1e9:.1f} GB are free, the checkpoints need {needed / 1e9:.1f} GB")
    if (url := url_of(run.config())) is not None:
        from trainer.checkpoint.object_store import probe as probe_store

        try:
            probe_store(url)
        except TrainerError as error:
            problems.append(f"{error.message}: {error.fix}")
    return NodeCheck(node=node, problems=problems, code=code_hash(run), data=data_seen(run.config()["data"]))


def bytes_to_come(run: RunDirectory) -> int:
    """Return the bytes for the checkpoints that are kept and one in progress, each as large as the newest."""
    keep_best: int = run.config()["checkpoint"]["keep_best"]
    newest = max(CheckpointStore(run.checkpoints_dir).committed(), key=lambda one: one.step, default=None)
    return max(LEAST_FREE_BYTES, (newest.bytes if newest else 0) * (1 + keep_best))


def code_hash(run: RunDirectory) -> str:
    """Return a hash of what this node would run: Python, packages, the files of the trainer and of the run."""
    from importlib import metadata  # the job script, which judges, does not need it

    digest = hashlib.sha256(sys.version.encode())
    for name in _PACKAGES:
        try:
            digest.update(f"{name} {metadata.version(name)}\n".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{name} missing\n".encode())
    for root in (Path(__file__).parents[1], run.code_dir):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def data_seen(data: dict[str, Any]) -> dict[str, bool]:
    """Return each value of `data` that looks like a path, and whether this node sees it."""
    return {value: Path(value).exists() for value in data.values() if isinstance(value, str) and "/" in value}


@dataclass(frozen=True)
class Together:
    """The ranks that all-reduce together, and this node among theirs."""

    shape: LaunchShape
    nodes: list[str]
    node: str
    interface: str | None
    """`cluster.network_interface`."""


def reduce_together(run: RunDirectory, shape: LaunchShape, nodes: list[str], node: str, timeout_s: float) -> Reduction:
    """Run this node's ranks of an all-reduce over all nodes; return how many joined and the speed of the slowest.

    Ends early when a node is found unfit: the others could not all-reduce without it.
    """
    together = Together(shape, nodes, node, run.config()["cluster"].get("network_interface"))
    return reduce_over(folder(run) / "rendezvous.json", together, timeout_s, _Others(run, nodes).unfit)


def reduce_over(
    rendezvous_file: Path, together: Together, timeout_s: float, unfit: Callable[[], str | None] = lambda: None
) -> Reduction:
    """Run this node's ranks of an all-reduce over all nodes.

    Args:
        rendezvous_file: Where the first node writes its address; on a file system that all nodes share.
        together: The ranks.
        timeout_s: Seconds until the ranks are given up.
        unfit: Returns a node that cannot take part, which ends the wait for it.
    """
    deadline = time.monotonic() + timeout_s
    nodes, node = together.nodes, together.node
    try:
        link = rendezvous.join(
            rendezvous_file,
            Place(
                len(nodes),
                nodes.index(node),
                nodes[0],
                peers=tuple(nodes),
                interface=together.interface,
            ),
            timeout_s=timeout_s,
            is_needed=lambda: unfit() is None,
        )
    except EnvironmentFault as error:
        return Reduction(joined=0, bytes_per_s=None, complaint=str(error.message))
    children = _start_ranks(together, link, timeout_s)
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline or unfit() is not None:
            break
        time.sleep(POLL_S)
    if link.listener is not None:
        link.listener.close()
    texts, complaints = [], []
    for child, (out, errors) in children.items():
        is_late = child.poll() is None
        child.kill()
        child.wait()
        texts.append(_content(out))
        if is_late:
            waited = f"no response within {timeout_s:g} s (cluster.preflight_timeout_s)"
            complaints.append(waited if unfit() is None else f"{unfit()} is unfit")
        elif child.returncode:
            complaints += _content(errors).strip().splitlines()[-1:]
    joined = [found for text in texts if (found := told(text)) is not None]
    speeds = [found.bytes_per_s for found in joined if found.bytes_per_s is not None]
    names = ["matrix {} GPU {}", "cpu matrix {} of rank {}"]
    name = names[together.shape.device == "cpu"]
    rates = {name.format(one.kind, rank): one.flops_s for rank, one in enumerate(joined) if one.flops_s is not None}
    return Reduction(
        joined=len(joined),
        bytes_per_s=min(speeds) if len(speeds) == len(children) else None,
        complaint=complaints[-1] if complaints else None,
        rates=rates or None,
    )


def _start_ranks(
    together: Together, link: rendezvous.Link, timeout_s: float
) -> dict[subprocess.Popen[bytes], tuple[IO[bytes], IO[bytes]]]:
    """Return the ranks of this node, each with the files of its stdout and stderr: a pipe might fill up."""
    shape, nodes = together.shape, together.nodes
    first = nodes.index(together.node) * shape.processes_per_node
    chosen = rendezvous.socket_variables(together.interface, chosen=True)
    children: dict[subprocess.Popen[bytes], tuple[IO[bytes], IO[bytes]]] = {}
    for local_rank in range(shape.processes_per_node):
        variables = {
            **rendezvous.socket_variables(link.own.interface, chosen=False),
            **os.environ,
            **chosen,
            **{"MASTER_ADDR": link.server.address, "MASTER_PORT": str(link.server.port)},
            **{"RANK": str(first + local_rank), "WORLD_SIZE": str(len(nodes) * shape.processes_per_node)},
            **{"LOCAL_RANK": str(local_rank), "OMP_NUM_THREADS": "1"},
        }
        command = processes.python_module(_WORKER, shape.device, str(timeout_s), link.server.token)
        given = []
        if link.listener is not None and local_rank == 0:
            given = [link.listener.fileno()]
            command.append(str(given[0]))
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  `_content` closes them
        child = subprocess.Popen(command, env=variables, stdout=files[0], stderr=files[1], pass_fds=given)
        children[child] = files
    return children


def _content(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")


class _Others:
    """The nodes of the job, read until each has written whether it is fit."""

    def __init__(self, run: RunDirectory, nodes: list[str]) -> None:
        self._run = run
        self._unread = list(nodes)
        self._unfit: str | None = None
        self._next = 0.0

    def unfit(self) -> str | None:
        """Return a node that has found itself unfit; None if there is none yet."""
        if self._unfit is not None or time.monotonic() < self._next:
            return self._unfit
        for node in list(self._unread):
            result = records.read_or_skip(NodeCheck, _result(self._run, node))
            if result is not None:
                self._unread.remove(node)
                self._unfit = node if result.problems else self._unfit
        self._next = time.monotonic() + READ_EVERY_S
        return self._unfit


def judge(run: RunDirectory, nodes: list[str]) -> tuple[dict[str, str], float | None]:
    """Return the problem of each unusable node, and the bytes per second of the slowest rank."""
    results = {node: records.read_or_skip(NodeCheck, _result(run, node)) for node in nodes}
    bad = {node: "no response" for node in nodes if results[node] is None}
    checked = {node: record for node, record in results.items() if record is not None}
    bad.update({node: "; ".join(record.problems) for node, record in checked.items() if record.problems})
    common = Counter(record.code for record in checked.values()).most_common(1)
    for node, record in checked.items():
        lacking = [path for path, seen in record.data.items() if not seen and _seen_elsewhere(checked, path)]
        if record.code != common[0][0]:
            bad.setdefault(node, "its code or packages differ from those of the others")
        elif lacking:
            bad.setdefault(node, f"it cannot see {lacking[0]}")
    if bad:  # the others could not all-reduce without these
        return bad, None
    if len(nodes) * run.shape().processes_per_node > 1:
        cut_off = [node for node, record in checked.items() if record.reduced is None]
        if cut_off:
            return {node: "no response from its ranks" for node in cut_off}, None
    reduced = {node: record.reduced for node, record in checked.items() if record.reduced is not None}
    most = max((one.joined for one in reduced.values()), default=0)
    bad = {node: "its ranks could not join the others" for node, one in reduced.items() if one.joined < most}
    failed = {node: str(one.complaint) for node, one in reduced.items() if not one.bytes_per_s}
    speeds = [one.bytes_per_s for one in reduced.values() if one.bytes_per_s is not None]
    return bad or failed, min(speeds) if speeds and len(speeds) == len(reduced) else None


def slower(reduced: Reduction, together: Together) -> list[str]:
    """Return what is slower than this node's baseline, which then has the other measurements."""
    gpus = [gpu.name for gpu in inventory().gpus] if together.shape.device == "cuda" else []
    values = dict(reduced.rates or {})
    if reduced.bytes_per_s:
        kind = "all-reduce" if gpus else "cpu all-reduce"
        values[f"{kind} of {together.shape.world_size} on {len(together.nodes)} nodes"] = reduced.bytes_per_s
    try:
        kept = baseline.read(socket.gethostname(), baseline.hardware_of(gpus))
        shares = {name: kept.slower(name, value) for name, value in values.items()}
        baseline.write(kept.with_measured(values))
    except (OSError, RuntimeError, UserError):  # no home on the nodes, or one that is not writable: no comparison
        return []
    return [f"{name} has {share:.0%} of the usual" for name, share in shares.items() if share is not None]


def slow(run: RunDirectory, nodes: list[str]) -> dict[str, list[str]]:
    """Return each node's measurements that are slower than it usually is."""
    checked = {node: records.read_or_skip(NodeCheck, _result(run, node)) for node in nodes}
    return {node: record.slow for node, record in checked.items() if record is not None and record.slow}


def _result(run: RunDirectory, node: str) -> Path:
    return folder(run) / f"{node}.json"


def _seen_elsewhere(checked: Mapping[str, NodeCheck], path: str) -> bool:
    return any(record.data.get(path) for record in checked.values())


def main(run: RunDirectory, nodes: list[str]) -> int:
    """Check this node, one of `nodes`, and write the result."""
    shape, cwd = run.shape(), run.launch().cwd
    node = os.environ["SLURMD_NODENAME"]
    folder(run).mkdir(parents=True, exist_ok=True)
    if cwd and os.path.isdir(cwd):
        os.chdir(cwd)
    result = check_node(run, shape, node)
    # At once, so that the others need not wait for a node that is unfit.
    write_atomic(_result(run, node), records.dumps(result, indent=1))
    if len(nodes) * shape.processes_per_node > 1 and not result.problems:
        timeout_s = float(run.config()["cluster"].get("preflight_timeout_s", DEFAULT_TIMEOUT_S))
        reduced = reduce_together(run, shape, nodes, node, timeout_s)
        result = replace(result, reduced=reduced, slow=slower(reduced, Together(shape, nodes, node, None)) or None)
    write_atomic(_result(run, node), records.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(RunDirectory(Path(sys.argv[1])), sys.argv[2:]))
