"""Planned against measured peak of memory for jobs drawn by seed on CPU ranks: `python benchmarks/planned_memory.py`.

Each job is planned by `trainer plan` and trained by `trainer fit` with the same overrides. Measured is rank 0 in its
fourth step: the tensors that it holds at the beginning, without the data set, and the blocks of at least 16 KiB that
the C library's allocator has handed out since, in all threads and at any instant (`planned_memory_held.c`, which needs
a C compiler). So what gloo stages during a collective counts; what a kernel allocates and frees within itself does not
(`planned_memory_callback.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import keep

HERE = Path(__file__).resolve().parent
LIMIT = 0.05
STEPS = 4
COUNTER = "held.so"
_RANKS = {"single": (1,), "ddp": (2, 4), "fsdp": (1, 2, 4), "hsdp": (4,), "tp": (2, 4)}
_RANKS_OF_ZERO = (2, 2, 4)
_ZERO = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
_BUCKET = 500_000
_FIRST_OF_ZERO = 44
"""From this seed on the strategies are DeepSpeed's."""


@dataclass(frozen=True)
class Job:
    """A job of the table."""

    model: str
    sizes: tuple[str, ...]
    strategy: str
    ranks: int
    micro_batch: int
    accumulate: int
    precision: str
    checkpointing: str
    optimizer: str
    clips: bool

    @property
    def overrides(self) -> list[str]:
        """The job on the command line."""
        readers = self.ranks // (2 if self.strategy == "tp" else 1)
        chosen = [
            *self.sizes,
            f"strategy={self.strategy}",
            f"optimizer={self.optimizer}",
            f"data.micro_batch={self.micro_batch}",
            f"data.batch_size={self.micro_batch * self.accumulate * readers}",
            f"trainer.precision={self.precision}",
            f"trainer.gradient_clip_norm={1.0 if self.clips else 'null'}",
            f"resources.cpu_processes={self.ranks}",
            "resources.gpus=0",
            "tracking=none",
            f"trainer.max_steps={STEPS}",
            "trainer.max_epochs=null",
            "trainer.limit_val_batches=0",
        ]
        if self.strategy == "hsdp":
            chosen.append("strategy.shard_size=2")
        if self.strategy == "tp":
            chosen.append("strategy.tensor_parallel_size=2")
        if self.strategy in _ZERO:  # else the empty room of a bucket of 200 million elements would be the peak
            chosen += [f"strategy.{kind}_bucket_size={_BUCKET}" for kind in ("reduce", "allgather")]
        if self.checkpointing != "none":
            chosen.append(f"strategy.activation_checkpointing={self.checkpointing}")
        return chosen


def draw(seed: int) -> Job:
    """Return the job of a seed."""
    choose = random.Random(seed).choice
    model = choose(("transformer", "transformer", "transformer", "vit", "resnet", "mlp"))
    checkpointing = "none"
    if model == "transformer":
        sizes = [
            "model=transformer",
            "data=text",
            "data.root=texts",
            "data.sequence_length=256",
            "model.vocab_size=256",
            "model.sequence_length=256",
            f"model.dim={choose((192, 256, 384))}",
            f"model.layers={choose((2, 4))}",
            f"model.norm={choose(('rms', 'layer'))}",
            f"model.activation={choose(('swiglu', 'gelu'))}",
            f"model.positions={choose(('rotary', 'learned'))}",
            f"model.tied={choose(('true', 'false'))}",
        ]
        micro_batch = choose((8, 16))
        checkpointing = choose(("none", "none", "full", "selective"))
    elif model == "vit":
        sizes = ["model=vit_small", "data=digits", "model.patch=2", "model.dim=192", f"model.layers={choose((3, 6))}"]
        micro_batch = choose((64, 128))
        checkpointing = choose(("none", "full"))
    elif model == "resnet":
        sizes = ["model=resnet_small", "data=digits", f"model.width={choose((32, 64))}"]
        micro_batch = choose((64, 128))
    else:
        width = choose((1024, 2048))
        sizes = ["model=mlp", "data=digits", f"model.hidden=[{width},{width},{width}]"]
        micro_batch = choose((64, 128))
    strategies = ["single", "ddp", "ddp", "fsdp", "fsdp", "hsdp"]
    strategy = choose(strategies + ["tp"] * (model == "transformer"))
    if seed >= _FIRST_OF_ZERO:
        strategy = _ZERO[seed % len(_ZERO)]
    accumulate = choose((1, 1, 2))
    ranks = _RANKS.get(strategy, _RANKS_OF_ZERO)
    while micro_batch * accumulate * max(ranks) > 512:  # the digits have only some batches an epoch
        micro_batch //= 2
    return Job(
        model,
        tuple(sizes),
        strategy,
        choose(ranks),
        micro_batch,
        accumulate,
        choose(("32-true", "32-true", "bf16-mixed", "bf16-true")),
        checkpointing,
        choose(("adamw", "adamw", "sgd")),
        choose((True, False)),
    )


def main() -> int:
    """Measure the jobs and print the table; returns 1 if a peak is further off than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=52, help="number of seeds (default: 52)")
    parser.add_argument("--rows", type=Path, help="file of rows: those in it are not measured again")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results/planned_memory.md")
    arguments = parser.parse_args()
    done = {}
    if arguments.rows and arguments.rows.exists():
        done = {row["seed"]: row for row in map(json.loads, arguments.rows.read_text().splitlines())}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        shutil.copy(HERE / "planned_memory_callback.py", project)
        build_counter(project)
        (project / "texts").mkdir()
        words = random.Random(0).choices(["peak", "of", "memory", "in", "a", "step", "\n"], k=80_000)
        (project / "texts" / "words.txt").write_text(" ".join(words))
        for seed in range(arguments.first, arguments.first + arguments.jobs):
            rows.append(done.get(seed) or _row(seed, draw(seed), project))
            print(json.dumps(rows[-1]), flush=True)
            if arguments.rows and seed not in done:
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    table = "\n".join(_table(rows))
    print(table)
    if arguments.keep:
        keep("planned_memory", "Planned against measured peak of memory on CPU ranks", table)
    return int(any(abs(error) > LIMIT for row in rows for error in _errors(row).values()))


def build_counter(folder: Path) -> None:
    """Compile the library that counts blocks into `folder`."""
    source = HERE / "planned_memory_held.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(folder / COUNTER), str(source)], check=True)


def _row(seed: int, job: Job, project: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": seed, **vars(job), "measured": None, "planned": {}, "problem": ""}
    for engine in ("simulation", "formula"):
        done = _trainer(project, "plan", *job.overrides, "--json", "--alternatives", "0", "--engine", engine)
        if done.returncode == 0:
            row["planned"][engine] = json.loads(done.stdout)["job"]["peak_bytes"]
        elif engine == "simulation":
            row["problem"] = done.stderr.strip()
            return row
    output = project / f"{seed}.json"
    callback = [
        "+callbacks.peak._target_=planned_memory_callback.Peak",
        f"+callbacks.peak.output={output}",
        f"+callbacks.peak.step={STEPS - 1}",
    ]
    done = _trainer(project, "fit", *job.overrides, *callback, f"name=seed-{seed}")
    if done.returncode == 0:
        row["measured"] = json.loads(output.read_text())["peak"]
    else:
        row["problem"] = next((line.strip() for line in done.stdout.splitlines() if "failed:" in line), "failed")
    return row


def _trainer(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
    environment = {**os.environ, "LD_PRELOAD": str(project / COUNTER)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def _errors(row: dict[str, Any]) -> dict[str, float]:
    measured = row["measured"]
    return {} if measured is None else {engine: peak / measured - 1 for engine, peak in row["planned"].items()}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        (__doc__ or "").partition("\n\n")[2].strip(),
        "",
        "| seed | model | strategy | ranks | micro-batch | accumulated | precision | checkpointing | optimizer "
        "| measured | simulation | formula |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = {engine: f"{error:+.1%}" for engine, error in _errors(row).items()}
        measured = row["problem"] or "none" if row["measured"] is None else f"{row['measured'] / 2**20:.1f} MiB"
        lines.append(
            f"| {row['seed']} | {row['model']} | {row['strategy']} | {row['ranks']} | {row['micro_batch']} "
            f"| {row['accumulate']} | {row['precision']} | {row['checkpointing']} | {row['optimizer']} "
            f"| {measured} | {errors.get('simulation', '')} | {errors.get('formula', '')} |"
        )
    for engine in ("simulation", "formula"):
        errors_of = [errors[engine] for errors in map(_errors, rows) if engine in errors]
        within = sum(abs(error) <= LIMIT for error in errors_of)
        lines += ["", f"{engine}: {within} of {len(errors_of)} within {LIMIT:.0%}."]
    return lines


if __name__ == "__main__":
    sys.exit(main())
