#!/usr/bin/env python3
"""The CPU time of commands that start no job, beside Hydra alone composing the same configuration.

    .venv/bin/python benchmarks/commands.py             fifteen rounds; about a minute on a quiet core
    .venv/bin/python benchmarks/commands.py --keep      also writes benchmarks/results/commands.md

In each round every command runs once, in an order by chance. Counted is the CPU time of the whole process. The lowest
of all rounds is what the command takes; the median also has what other processes on the machine cost it. Bytecode is
cached, as on a user's machine, whatever PYTHONDONTWRITEBYTECODE says.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from kept import keep

from trainer.core.paths import conf_dir

JOB = "experiment=quickstart"
HYDRA = f"""
import hydra
@hydra.main(version_base=None, config_path={str(conf_dir())!r}, config_name="config")
def main(config): ...
main()
"""
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import hydra": ["-c", "import hydra"],
    "Hydra alone: --cfg job": ["hydra_app.py", JOB, "--cfg", "job"],
    "trainer --help": ["-m", "trainer", "--help"],
    "trainer ls (no run)": ["-m", "trainer", "ls"],
    "trainer fit --cfg job": ["-m", "trainer", "fit", JOB, "--cfg", "job"],
    "trainer check": ["-m", "trainer", "check", JOB],
    "trainer fit --dry-run": ["-m", "trainer", "fit", JOB, "--dry-run"],
}


def cpu_s(arguments: list[str], folder: Path) -> float:
    """Return the CPU seconds of a Python process, with those of the processes that it has waited for."""
    child = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with {child.returncode}")
    return used.ru_utime + used.ru_stime


def table(found: dict[str, list[float]]) -> str:
    hydra_s = min(found["Hydra alone: --cfg job"])
    lines = ["| command | CPU, ms | median | to Hydra alone |", "|---|---|---|---|"]
    for name, values in found.items():
        least, middle = min(values), statistics.median(values)
        lines.append(f"| {name} | {least * 1000:.0f} | {middle * 1000:.0f} | {least / hydra_s:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    chance = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hydra_app.py").write_text(HYDRA)
        for _ in range(options.rounds + 1):  # the first one fills caches
            for name in chance.sample(list(COMMANDS), len(COMMANDS)):
                found[name].append(cpu_s(COMMANDS[name], Path(folder)))
    text = table({name: values[1:] for name, values in found.items()})
    print(text)
    if options.keep:
        keep("commands", "Commands that start no job", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
