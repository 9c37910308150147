"""Measure the same optimizer step on each device, precision and strategy of this machine, one short job each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.core import processes, records
from trainer.core.gpu import Gpu
from trainer.core.records import BadRecord
from trainer.core.text import one_line
from trainer.doctor.probe import give_up
from trainer.hardware.catalogue import known

JOB_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Case:
    """A way to compute the step."""

    device: str
    """Such as `CPU`, `GPU 0` or `4 GPUs`."""
    ranks: int
    strategy: str
    precision: str
    entries: tuple[str, ...] = ()
    """The GPUs, as CUDA_VISIBLE_DEVICES names them; empty: the CPU."""

    @property
    def overrides(self) -> list[str]:
        """The overrides of its job."""
        shape = (
            [f"resources.gpus={self.ranks}", "resources.cpu_processes=null"]
            if self.entries
            else ["resources.gpus=0", f"resources.cpu_processes={self.ranks}"]
        )
        return [*shape, f"strategy={self.strategy}", f"trainer.precision={self.precision}"]

    @property
    def label(self) -> str:
        """A line for the plot."""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 and not self.entries else ""
        return f"{self.device}{ranks}, {self.strategy}, {self.precision}"


@dataclass(frozen=True, kw_only=True)
class TimedJob:
    """What is used of the JSON of `trainer time`."""

    step_s: float
    fastest_s: float
    samples_s: float | None
    is_busy: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a case reached."""

    device: str
    ranks: int
    strategy: str
    precision: str
    label: str
    step_s: float | None = None
    """Median time of a step."""
    fastest_s: float | None = None
    samples_s: float | None = None
    speedup: float | None = None
    """Samples per second over those of the first case."""
    is_busy: bool = False
    """Whether other programs used the CPU meanwhile."""
    problem: str = ""


def cases(gpus: Sequence[Gpu], cores: int, strategies: Sequence[str]) -> list[Case]:
    """Return the cases of a machine: one and two ranks on the CPU, each GPU alone, all GPUs together.

    Args:
        gpus: The GPUs that may be used, none of them by somebody else.
        cores: CPU cores.
        strategies: Strategies for several ranks.
    """
    found = [Case("CPU", 1, "single", precision) for precision in ("32-true", "bf16-mixed")]
    if cores > 1:
        found += [Case("CPU", 2, one, precision) for one in strategies for precision in ("32-true", "bf16-mixed")]
    for gpu in gpus:
        found += [Case(f"GPU {gpu.index}", 1, "single", kind, (gpu.entry,)) for kind in _precisions(gpu)]
    if len(gpus) > 1:
        entries, kinds = tuple(gpu.entry for gpu in gpus), _precisions(gpus[0])
        count = len(entries)
        found += [Case(f"{count} GPUs", count, one, kind, entries) for one in strategies for kind in kinds]
    return found


def _precisions(gpu: Gpu) -> list[str]:
    """Return what a GPU computes in; one that the catalogue does not have is tried in bf16."""
    device = known(gpu.name)
    return ["32-true", "bf16-mixed" if device is None or device.supports("bf16") else "16-mixed"]


def measure(case: Case, overrides: Sequence[str], steps: int, base: Row | None) -> Row:
    """Run the job of a case and return what it reached, compared with `base`."""
    facts: dict[str, Any] = {
        "device": case.device,
        "ranks": case.ranks,
        "strategy": case.strategy,
        "precision": case.precision,
        "label": case.label,
    }
    answer = _time([*overrides, *case.overrides], case.entries, steps)
    if isinstance(answer, str):
        return Row(**facts, problem=answer)
    samples_s = answer.samples_s
    speedup = samples_s / base.samples_s if samples_s and base is not None and base.samples_s else None
    return Row(
        **facts,
        step_s=answer.step_s,
        fastest_s=answer.fastest_s,
        samples_s=samples_s,
        speedup=1.0 if base is None and samples_s else speedup,
        is_busy=answer.is_busy,
    )


def _time(overrides: Sequence[str], entries: Sequence[str], steps: int) -> TimedJob | str:
    """Return the report of `trainer time` on a job, or why there is none."""
    command = processes.python_module("trainer", "time", "--json", "--steps", str(steps), *overrides)
    process = subprocess.Popen(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(entries)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        out, errors = process.communicate(timeout=JOB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        give_up(process)
        return f"not done within {JOB_TIMEOUT_S:.0f} s"
    except BaseException:
        process.terminate()  # it stops its job, as after Ctrl-C
        process.wait()
        raise
    if process.returncode != 0:
        lines = [line for line in errors.strip().splitlines() if line.startswith("trainer: ")] or errors.splitlines()
        return one_line(lines[-1].removeprefix("trainer: ")) if lines else f"exit code {process.returncode}"
    try:
        return records.loads(TimedJob, out[max(0, out.find("{\n")) :], "the answer of trainer time")
    except BadRecord as error:
        return error.message


def log(text: str) -> None:
    """Print progress, which is no part of the result."""
    print(text, file=sys.stderr, flush=True)
