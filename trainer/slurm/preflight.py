"""Check the nodes of an allocation before the first attempt: `python -m trainer.slurm.preflight RUN_DIR NODES`.

Each node checks itself, then all ranks all-reduce some megabytes. The results are in `preflight/JOB-RESTART/NODE.json`,
and `judge` returns the nodes that must not be used. It takes less than a minute.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.store import CheckpointStore
from trainer.config.shape import LaunchShape
from trainer.core import records
from trainer.core.files import write_atomic
from trainer.core.hardware import count_gpus
from trainer.runs.directory import RunDirectory
from trainer.runs.records import NodeCheck, Reduction

MOST_SKEW_S = 5.0
"""Largest clock difference; a larger one confuses which of two files is newer."""
LEAST_FREE_BYTES = 200_000_000
REDUCE_TIMEOUT_S = 40
_PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "hydra-core", "omegaconf")
_WORKER = "trainer.runtime.reduce"


def folder(run: RunDirectory, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the results of this allocation."""
    restart = environment.get("SLURM_RESTART_COUNT") or 0
    return run.path / "preflight" / f"{environment['SLURM_JOB_ID']}-{restart}"


def check_node(run: RunDirectory, shape: LaunchShape, node: str) -> NodeCheck:
    """Check this node. Returns its problems, and what is compared with the other nodes."""
    problems = []
    if shape.device == "cuda" and (gpus := count_gpus()) < shape.processes_per_node:
        problems.append(f"{gpus} GPUs are usable, {shape.processes_per_node} are needed")
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
    return NodeCheck(node=node, problems=problems, code=code_hash(run), data=data_seen(run.config()["data"]))


def bytes_to_come(run: RunDirectory) -> int:
    """Return the bytes for the checkpoints that are kept and one in progress, each as large as the newest."""
    keep_best: int = run.config()["checkpoint"]["keep_best"]
    newest = max(CheckpointStore(run.checkpoints_dir).committed(), key=lambda one: one.step, default=None)
    return max(LEAST_FREE_BYTES, (newest.bytes if newest else 0) * (1 + keep_best))


def code_hash(run: RunDirectory) -> str:
    """Return a hash of what this node would run: Python, packages, the files of the trainer and of the run."""
    digest = hashlib.sha256(sys.version.encode())
    for name in _PACKAGES:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"{name} missing\n".encode())
    for root in (Path(__file__).parents[1], run.code_dir):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def data_seen(data: dict[str, Any]) -> dict[str, bool]:
    """Return each value of `data` that looks like a path, and whether this node sees it."""
    return {value: Path(value).exists() for value in data.values() if isinstance(value, str) and "/" in value}


def reduce_together(run: RunDirectory, shape: LaunchShape, nodes: list[str], node: str) -> Reduction:
    """Run this node's ranks of an all-reduce over all nodes; return how many joined and the speed of the slowest."""
    first = nodes.index(node) * shape.processes_per_node
    port = 30000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    children = []
    for local_rank in range(shape.processes_per_node):
        variables = {
            **os.environ,
            **{"MASTER_ADDR": nodes[0], "MASTER_PORT": str(port), "LOCAL_RANK": str(local_rank)},
            **{"RANK": str(first + local_rank), "WORLD_SIZE": str(len(nodes) * shape.processes_per_node)},
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", _WORKER, shape.device]
        children.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    deadline = time.monotonic() + REDUCE_TIMEOUT_S
    texts, complaints = [], []
    for child in children:
        try:
            out, errors = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            out, errors = child.communicate()
            complaints.append(f"no response within {REDUCE_TIMEOUT_S} s")
        texts.append(out.decode())
        complaints += errors.decode(errors="replace").strip().splitlines()[-1:] if child.returncode else []
    speeds = [float(text.split()[-1]) for text in texts if text.startswith("joined") and len(text.split()) == 2]
    return Reduction(
        joined=sum(text.startswith("joined") for text in texts),
        bytes_per_s=min(speeds) if len(speeds) == len(children) else None,
        complaint=complaints[-1] if complaints else None,
    )


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
    reduced = {node: record.reduced for node, record in checked.items() if record.reduced is not None}
    most = max((one.joined for one in reduced.values()), default=0)
    bad = {node: "its ranks could not join the others" for node, one in reduced.items() if one.joined < most}
    failed = {node: str(one.complaint) for node, one in reduced.items() if not one.bytes_per_s}
    speeds = [one.bytes_per_s for one in reduced.values() if one.bytes_per_s is not None]
    return bad or failed, min(speeds) if speeds and len(speeds) == len(reduced) else None


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
    if len(nodes) * shape.processes_per_node > 1 and not result.problems:
        result = replace(result, reduced=reduce_together(run, shape, nodes, node))
    write_atomic(_result(run, node), records.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(RunDirectory(Path(sys.argv[1])), sys.argv[2:]))
