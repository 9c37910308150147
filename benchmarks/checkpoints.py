#!/usr/bin/env python3
"""What a checkpoint costs: how long a save stops the training, what hashing adds to it, and how long a restore reads.

    .venv/bin/python benchmarks/checkpoints.py             1 GiB in one process; about two minutes on two quiet cores
    .venv/bin/python benchmarks/checkpoints.py --keep      also writes benchmarks/results/checkpoints.md

The variants take turns, so that what else the machine does hits all; the table has medians. A restore reads from the
disk: the page cache of its files is dropped first. The first asynchronous save, which allocates the host memory that
later saves reuse, is reported apart. Exit code 1 when the stall misses its target.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kept import keep

from trainer.checkpoint import commit, hashing, writeback
from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint

TARGET = 0.04
"""Stall of an asynchronous save as a share of a synchronous one."""
TENSOR_BYTES = 16 << 20


class NoDigest:
    """In the place of a hash: what writing costs alone."""

    def update(self, data: object) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


def tensors_of(total_bytes: int) -> dict[str, torch.Tensor]:
    return {f"model/{number}": torch.randn(TENSOR_BYTES // 4) for number in range(total_bytes // TENSOR_BYTES)}


def save(writer: CheckpointWriter, tensors: dict[str, torch.Tensor], step: int, layout: str) -> dict[str, float]:
    """Seconds for which training would have waited, and until the commit; CPU seconds of the process meanwhile."""
    started, cpu = time.perf_counter(), time.process_time()
    target = writer.store.path(step)
    if layout == "sharded":
        state = {"optimizers": {"groups": [], "values": {}}}
        writer.save_sharded(tensors, state, target, CommitInfo(step=step, layout="sharded"), None)
    else:
        writer.save({"state_dict": tensors}, target, CommitInfo(step=step))
    found = {"stall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    writer.wait()
    writer.raise_if_failed()
    found["whole"] = time.perf_counter() - started
    return found


def stalls(folder: Path, tensors: dict[str, torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """A row for each layout: synchronous and asynchronous saves in turn."""
    rows = []
    for layout in ("file", "sharded"):
        writers = {
            name: CheckpointWriter(CheckpointStore(folder / name), asynchronous=name == "async")
            for name in ("sync", "async")
        }
        found: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
        for step in range(rounds + 1):
            for name, writer in writers.items():
                found[name].append(save(writer, tensors, step, layout))
                shutil.rmtree(writer.store.path(step))
        first = found["async"][0]["stall"]
        medians = {
            (name, key): statistics.median(one[key] for one in of_name[1:])
            for name, of_name in found.items()
            for key in of_name[0]
        }
        rows.append({"layout": layout, "first": first, **medians})
    return rows


CHECKSUMS = {
    "none": ("none", False, True),
    "none, and the disk begins at the fsync": ("none", False, False),
    "by a thread while the files are written": ("while", True, True),
    "the same, and the disk begins at the fsync (before)": ("while", True, False),
    "from the files, once they are written": ("after", False, True),
}
"""What is compared: when files are hashed, whether they are while written, whether the disk writes at once."""
ALONE = "SHA-256 of the state in memory, by one thread, alone"


def hashing_costs(folder: Path, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of a synchronous sharded save, by when its files are hashed and reach the disk."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*CHECKSUMS, ALONE)}
    writer = CheckpointWriter(CheckpointStore(folder / "hashed"), asynchronous=False)
    for _ in range(rounds):
        for name, (when, hashes, at_once) in CHECKSUMS.items():
            path = writer.store.path(1)
            with ExitStack() as changed:
                if not hashes:
                    changed.enter_context(mock.patch.object(hashing, "hashlib", _Hashlib))
                if not at_once:
                    changed.enter_context(mock.patch.object(writeback, "_sync_file_range", return_value=None))
                started, cpu = time.perf_counter(), time.process_time()
                save(writer, tensors, 1, "sharded")
            if when == "after":
                for file in sorted((path / "shards").iterdir()):
                    hashing.sha256(file)
            found[name].append((time.perf_counter() - started, time.process_time() - cpu))
            shutil.rmtree(path)
        started, cpu = time.perf_counter(), time.process_time()
        digest = hashlib.sha256()
        for tensor in tensors.values():
            digest.update(memoryview(tensor.numpy()).cast("B"))
        found[ALONE].append((time.perf_counter() - started, time.process_time() - cpu))
    return {
        name: {"s": statistics.median(wall for wall, _ in times), "cpu": statistics.median(cpu for _, cpu in times)}
        for name, times in found.items()
    }


class _Hashlib:
    sha256 = NoDigest


def restores(folder: Path, tensors: dict[str, torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of threads: verifying, then reading into tensors that exist."""
    store = CheckpointStore(folder / "restore")
    names = sorted(tensors)
    paths = []
    for part in range(4):  # a file each: one process writes one
        writer = CheckpointWriter(store, asynchronous=False)
        paths.append(store.path(part + 1))
        save(writer, {name: tensors[name] for name in names[part::4]}, part + 1, "sharded")
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    most = hashing.MOST_THREADS
    found: dict[int, list[dict[str, float]]] = {1: [], most: []}
    for _ in range(rounds):
        for count in found:
            hashing.MOST_THREADS = count
            drop_cache(folder)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            problems = [problem for path in paths for problem in commit.verify(path)]
            verified = time.perf_counter() - started
            drop_cache(folder)
            started = time.perf_counter()
            for part, path in enumerate(paths):
                StoredCheckpoint(path).read({name: into[name] for name in names[part::4]})
            read = time.perf_counter() - started
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            assert not problems
            assert all(torch.equal(into[name], tensors[name]) for name in names)
            found[count].append({"verify": verified, "read": read, "mib": more})
    hashing.MOST_THREADS = most
    return [
        {
            "threads": min(count, hashing.threads()),
            **{key: statistics.median(one[key] for one in rows) for key in rows[0]},
        }
        for count, rows in found.items()
    ]


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(
    size_gb: float, rows: list[dict[str, Any]], hashed: dict[str, dict[str, float]], read: list[dict[str, Any]]
) -> str:
    lines = [
        f"A state of {size_gb:g} GiB.",
        "",
        "| layout | synchronous save, s | stall of an asynchronous one, s | stall, % | CPU of the stall, s | until the "
        "commit, s | first stall, s | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["async", "stall"] / row["sync", "stall"]
        lines.append(
            f"| {row['layout']} | {row['sync', 'stall']:.2f} | {row['async', 'stall']:.3f} | {100 * share:.1f} "
            f"| {row['async', 'cpu']:.3f} | {row['async', 'whole']:.2f} | {row['first']:.2f} "
            f"| {100 * TARGET:g} {'met' if share <= TARGET else 'MISSED'} |"
        )
    lines += [
        "",
        "| checksums of a synchronous save | s | CPU, s |",
        "|---|---|---|",
        *(f"| {name} | {one['s']:.2f} | {one['cpu']:.2f} |" for name, one in hashed.items()),
        "",
        "| threads | verify, s | read, s | more memory than the tensors, MiB |",
        "|---|---|---|---|",
        *(f"| {one['threads']} | {one['verify']:.2f} | {one['read']:.2f} | {one['mib']:.0f} |" for one in read),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state; default: 1")
    parser.add_argument("--rounds", type=int, default=3, help="of each variant; default: 3")
    parser.add_argument("--folder", type=Path, help="on the file system to measure; default: the temporary directory")
    parser.add_argument("--keep", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args()
    tensors = tensors_of(int(options.gib * 2**30))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = [measured(Path(name), tensors, options.rounds) for measured in (stalls, hashing_costs, restores)]
    text = f"Load {os.getloadavg()[0]:.1f}. " + table(options.gib, *found)
    print(text)
    if options.keep:
        keep("checkpoints", "What checkpoints cost", text)
    return 0 if all(row["async", "stall"] <= TARGET * row["sync", "stall"] for row in found[0]) else 1


if __name__ == "__main__":
    sys.exit(main())
