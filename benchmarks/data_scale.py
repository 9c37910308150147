#!/usr/bin/env python3
"""What data cost as they grow: opening token shards of 10 MB to 1 TB, and a sample of a user's own data set.

    benchmarks/data_scale.py               about three minutes on a quiet machine
    benchmarks/data_scale.py --keep        also writes benchmarks/results/data_scale.md

The shards are sparse: they have their sizes and no blocks on the disk, and what is read of them is zeros. Each row is a
process of its own. Exit code 1 where the memory or the CPU time to the first batch grows with the data, or where our
loader costs a user's data set more than twice what torch's does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kept

SIZES = {"10 MB": 10**7, "1 GB": 10**9, "10 GB": 10**10, "100 GB": 10**11, "1 TB": 10**12}
WITH_TABLE = ("10 MB", "10 GB", "100 GB")
"""Also read in the order that was drawn as a table; of 1 TB it would have 2 GB."""
SHARD_BYTES = 2**26
LENGTH, BATCH, BATCHES, SEED = 1024, 32, 300, 0
MOST_GROWTH_MB, MOST_CPU_S = 24, 0.5
"""More at 1 TB than at 10 MB: the index of 15,000 shards is 12 MB of them."""
SAMPLES, ROUNDS, WORKERS, MOST_RATIO = 20_000, 3, 2, 2.0


def write_sparse(root: Path, num_bytes: int) -> None:
    """What `trainer data tokenize` writes, but for the tokens; the checksums are not those of zeros."""
    root.mkdir()
    sizes = [SHARD_BYTES] * (num_bytes // SHARD_BYTES) + [num_bytes % SHARD_BYTES]
    files = {f"train-{number:05d}.bin": size for number, size in enumerate(sizes)}
    files |= {f"{split}-00000.bin": 2 * 100 * LENGTH for split in ("val", "test")}
    for name, size in files.items():
        with open(root / name, "wb") as file:
            file.truncate(size)
    meta = {"vocab_size": 50_257, "tokens": {"train": num_bytes // 2, "val": 1}, "bytes": {"val": 1}}
    from hashlib import sha256

    content = json.dumps({"files": {name: [size, "0" * 64] for name, size in files.items()}}).encode()
    (root / "index.json").write_bytes(content)
    meta["index"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (root / "meta.json").write_text(json.dumps(meta))


def own_memory() -> float:
    """MB of this process that are not pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def read_shards(root: Path, as_table: bool) -> dict[str, float]:
    """Open the shards and read some batches, as a rank of 64 does."""
    import torch

    from trainer.config.batch import BatchPlan
    from trainer.data import order
    from trainer.data.loader import resumable
    from trainer.data.token_shards import TokenShards

    torch.set_num_threads(1)
    if as_table:
        order.MOST_IN_TABLE = 2**62
    before, began, began_cpu = own_memory(), time.perf_counter(), time.process_time()
    data = TokenShards(str(root), BATCH, LENGTH)
    data.setup("fit")
    loader = resumable(data.train_dataloader(), BatchPlan.of(BATCH, None, 1), 0, SEED)
    batches = (batch for _ in itertools.count() for batch in loader)
    next(batches)
    found = {"windows": len(data.train), "cpu_s": time.process_time() - began_cpu}  # type: ignore[arg-type]
    found |= {"wall_s": time.perf_counter() - began, "memory_mb": own_memory() - before}
    for _ in range(BATCHES):
        next(batches)
    return found | {"later_mb": own_memory() - before}


class Rows:
    """A user's data set of 8 KB samples in memory; `random` as such data sets have it, unset."""

    def __init__(self) -> None:
        import torch

        self.rows = torch.arange(2048 * 1024).view(2048, 1024)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % 2048]


class PlainRows(Rows):
    """One that says that it draws no random numbers."""

    random = False


def bare() -> Iterator[Any]:
    """The loop that reads the samples by itself."""
    import torch

    rows, order = Rows(), torch.randperm(SAMPLES).tolist()
    for begin in range(0, SAMPLES, BATCH):
        yield torch.stack([rows[index] for index in order[begin : begin + BATCH]])


def of_torch(workers: int) -> Callable[[], Any]:
    from torch.utils.data import DataLoader

    return lambda: DataLoader(Rows(), BATCH, shuffle=True, num_workers=workers, drop_last=True)  # type: ignore[arg-type]


def ours(rows: type[Rows], workers: int) -> Callable[[], Any]:
    from torch.utils.data import DataLoader

    from trainer.config.batch import BatchPlan
    from trainer.data.loader import resumable

    def loader() -> Any:
        given = DataLoader(rows(), BATCH, shuffle=True, num_workers=workers, drop_last=True)  # type: ignore[arg-type]
        return resumable(given, BatchPlan.of(BATCH, None, 1), 0, SEED)

    return loader


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure_loaders() -> dict[str, float]:
    """Microseconds of CPU a sample, of this process and its workers, whose start and end are counted."""
    import torch

    torch.set_num_threads(1)
    variants = {
        "bare loop": bare,
        "torch's DataLoader, no worker": of_torch(0),
        "ours, no worker": ours(PlainRows, 0),
        "ours, no worker, seeded samples": ours(Rows, 0),
        f"torch's DataLoader, {WORKERS} workers": of_torch(WORKERS),
        f"ours, {WORKERS} workers": ours(PlainRows, WORKERS),
        f"ours, {WORKERS} workers, seeded samples": ours(Rows, WORKERS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS):
        names = list(variants) if turn % 2 else list(variants)[::-1]
        for name in names:
            began = cpu_s()
            for _ in variants[name]():
                pass
            seconds[name].append((cpu_s() - began) / SAMPLES * 1e6)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_process(*arguments: str) -> Any:
    command = [sys.executable, __file__, "--case", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def sizes() -> tuple[list[str], list[str]]:
    """The table of sizes, and what is not as it should be."""
    lines = [
        "| token shards | order | shards | windows | CPU s to the first batch | its memory, MB "
        f"| after {BATCHES} batches more, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {}
    for name, num_bytes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "shards"
            write_sparse(root, num_bytes)
            for order in ("ours", "a table") if name in WITH_TABLE else ("ours",):
                row = found[name, order] = in_process(str(root), order)
                lines.append(
                    f"| {name} | {order} | {num_bytes // SHARD_BYTES + 1:,} | {row['windows']:,} | {row['cpu_s']:.2f} "
                    f"| {row['memory_mb']:.0f} | {row['later_mb']:.0f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    first, last = found["10 MB", "ours"], found["1 TB", "ours"]
    missed = []
    if last["later_mb"] - first["later_mb"] > MOST_GROWTH_MB:
        missed.append(f"1 TB takes {last['later_mb'] - first['later_mb']:.0f} MB more than 10 MB")
    if last["cpu_s"] - first["cpu_s"] > MOST_CPU_S:
        missed.append(f"the first batch of 1 TB takes {last['cpu_s'] - first['cpu_s']:.2f} s of CPU more")
    return lines, missed


def loaders() -> tuple[list[str], list[str]]:
    """The table of loaders, and what is not as it should be."""
    found = in_process("loaders")
    lines = ["| 8 KB samples | us of CPU a sample |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in found.items()]
    ratio = found[f"ours, {WORKERS} workers"] / found[f"torch's DataLoader, {WORKERS} workers"]
    return lines, [f"{ratio:.2f} times torch's loader with workers"] if ratio > MOST_RATIO else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/data_scale.md")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, *order = options.case
        print(json.dumps(measure_loaders() if case == "loaders" else read_shards(Path(case), order == ["a table"])))
        return 0
    load = os.getloadavg()[0]
    tables, missed = zip(sizes(), loaders(), strict=True)
    text = "\n\n".join("\n".join(lines) for lines in tables)
    text += (
        f"\n\nWindows of {LENGTH:,} tokens (uint16), {BATCH} a batch, shards of {SHARD_BYTES / 1e6:.0f} MB, sparse; "
        f'load {load:.1f} at the beginning. "A table" is `torch.randperm` of all windows, as before 0.2. Workers\' '
        f"start and end are counted, over {SAMPLES:,} samples; medians of {ROUNDS} turns."
    )
    print(text)
    if options.keep:
        kept.keep("data_scale", "Data at scale", text)
    for one in (*missed[0], *missed[1]):
        print(f"missed: {one}", file=sys.stderr)
    return 1 if missed[0] or missed[1] else 0


if __name__ == "__main__":
    sys.exit(main())
