"""Step 0 of an allocation: is every node fit for this run? `python -m trainer.slurm.preflight RUN_DIR NODES`.

Each node looks at itself, then all ranks reduce some megabytes together; what it found is in
`preflight/JOB-RESTART/NODE.json`, and `judge` names the nodes that must not be used. Under a minute in all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.store import CheckpointStore
from trainer.config.shape import LaunchShape
from trainer.core.files import read_json, write_atomic
from trainer.core.hardware import count_gpus
from trainer.runs.directory import RunDirectory

MOST_SKEW_S = 5.0
"""Clocks further apart than this mix up which file is the newer one."""
LEAST_FREE_BYTES = 200_000_000
REDUCE_TIMEOUT_S = 40
_PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "hydra-core", "omegaconf")
_WORKER = "trainer.runtime.reduce"


def folder(run: RunDirectory, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the nodes of this allocation write."""
    restart = environment.get("SLURM_RESTART_COUNT") or 0
    return run.path / "preflight" / f"{environment['SLURM_JOB_ID']}-{restart}"


def look(run: RunDirectory, shape: LaunchShape, node: str) -> dict[str, Any]:
    """What this node says of itself: `problems` in words, and what is compared with the other nodes."""
    problems = []
    if shape.device == "cuda" and (gpus := count_gpus()) < shape.processes_per_node:
        problems.append(f"{gpus} GPUs can be used and {shape.processes_per_node} are needed")
    probe = folder(run) / f".{node}"
    try:
        before = time.time()
        write_atomic(probe, node)
        written, after = probe.stat().st_mtime, time.time()
        probe.unlink()
        skew_s = max(before - written, written - after)  # a slow disk is no wrong clock
        if skew_s > MOST_SKEW_S:
            problems.append(f"its clock is {skew_s:.0f} s from that of the run directory's disk")
    except OSError as error:
        problems.append(f"cannot write into the run directory: {error.strerror}")
    free = shutil.disk_usage(run.path).free
    needed = bytes_to_come(run)
    if free < needed:
        problems.append(f"{free / 1e9:.1f} GB are free and the checkpoints need {needed / 1e9:.1f} GB")
    return {"node": node, "problems": problems, "code": code_hash(run), "data": data_seen(run.config()["data"])}


def bytes_to_come(run: RunDirectory) -> int:
    """For the checkpoints that will be kept, as large as the newest one, and the one that is written beside them."""
    options = run.config()["checkpoint"]
    newest = max(CheckpointStore(run.checkpoints_dir).committed(), key=lambda one: one.step, default=None)
    return max(LEAST_FREE_BYTES, (newest.bytes if newest else 0) * (1 + options["keep_best"]))


def code_hash(run: RunDirectory) -> str:
    """Of what this node would run: Python, the packages, the trainer's own files and the run's."""
    found = hashlib.sha256(sys.version.encode())
    for name in _PACKAGES:
        try:
            found.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            found.update(f"{name} missing\n".encode())
    for root in (Path(__file__).parents[1], run.code_dir):
        for path in sorted(root.rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def data_seen(data: dict[str, Any]) -> dict[str, bool]:
    """Each value of `data` that looks like a path, and whether it is there."""
    return {value: Path(value).exists() for value in data.values() if isinstance(value, str) and "/" in value}


def reduce_together(run: RunDirectory, shape: LaunchShape, nodes: list[str], node: str) -> dict[str, Any]:
    """Start this node's ranks of a reduction over all; how many of them joined, and the slowest one's speed."""
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
            complaints.append(f"no answer in {REDUCE_TIMEOUT_S} s")
        texts.append(out.decode())
        complaints += errors.decode(errors="replace").strip().splitlines()[-1:] if child.returncode else []
    speeds = [float(text.split()[-1]) for text in texts if text.startswith("joined") and len(text.split()) == 2]
    return {
        "joined": sum(text.startswith("joined") for text in texts),
        "bytes_per_s": min(speeds) if len(speeds) == len(children) else None,
        "complaint": complaints[-1] if complaints else None,
    }


def judge(run: RunDirectory, nodes: list[str]) -> tuple[dict[str, str], float | None]:
    """Node to what is wrong with it, of those that must not be used; bytes per second of the slowest rank."""
    found = {node: read_json(folder(run) / f"{node}.json") for node in nodes}
    bad = {node: "gave no answer" for node in nodes if found[node] is None}
    there = {node: record for node, record in found.items() if record is not None}
    bad.update({node: "; ".join(record["problems"]) for node, record in there.items() if record["problems"]})
    common = Counter(record["code"] for record in there.values()).most_common(1)
    for node, record in there.items():
        lacking = [path for path, seen in record["data"].items() if not seen and _seen_elsewhere(there, path)]
        if record["code"] != common[0][0]:
            bad.setdefault(node, "its code or packages are not those of the others")
        elif lacking:
            bad.setdefault(node, f"it does not see {lacking[0]}")
    if bad:  # the others could not reduce without these
        return bad, None
    ranks = {node: record["reduced"]["joined"] for node, record in there.items() if record.get("reduced")}
    most = max(ranks.values(), default=0)
    bad = {node: "its ranks could not join the others" for node, joined in ranks.items() if joined < most}
    speeds = [record["reduced"]["bytes_per_s"] for record in there.values() if record.get("reduced")]
    failed = {
        node: str(there[node]["reduced"]["complaint"]) for node in ranks if not there[node]["reduced"]["bytes_per_s"]
    }
    return bad or failed, min(speeds) if speeds and None not in speeds else None


def _seen_elsewhere(there: Mapping[str, dict[str, Any]], path: str) -> bool:
    return any(record["data"].get(path) for record in there.values())


def main(run: RunDirectory, nodes: list[str]) -> int:
    """Look at this node, one of `nodes`, and write down what was found."""
    shape = LaunchShape.from_dict(run.launch()["shape"])
    node = os.environ["SLURMD_NODENAME"]
    folder(run).mkdir(parents=True, exist_ok=True)
    if os.path.isdir(run.launch().get("cwd", "")):
        os.chdir(run.launch()["cwd"])
    found = look(run, shape, node)
    if len(nodes) * shape.processes_per_node > 1 and not found["problems"]:
        found["reduced"] = reduce_together(run, shape, nodes, node)
    write_atomic(folder(run) / f"{node}.json", json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(RunDirectory(Path(sys.argv[1])), sys.argv[2:]))
