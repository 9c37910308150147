"""Time the checks of a sweep: every point composed and checked before anything starts.

    python benchmarks/sweep_points.py --points 1000

Prints the CPU seconds and the memory of the command's own work, and those of points that are composed one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time

from trainer.cli.job import check_all
from trainer.cli.sweep_launch import create, prepare
from trainer.config.compose import compose

JOB = ["experiment=quickstart", "resources.gpus=0", "tracking=none"]


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=20, help="points that are also composed and checked alone")
    options = parser.parse_args()
    overrides = [*JOB, f"seed=range(0,{options.points})"]
    arguments = argparse.Namespace(overrides=overrides, config_dir=[], config_name="config")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began = time.process_time()
        prepared = prepare(arguments)
        checked = time.process_time()
        create(prepared)
        made = time.process_time()
        for seed in range(options.alone):
            check_all([compose([*JOB, f"seed={seed}"], config_dirs=[])])
        alone = (time.process_time() - made) / max(options.alone, 1)
    answer = {
        "points": options.points,
        "check_s": round(checked - began, 2),
        "create_s": round(made - checked, 2),
        "ms_a_point": round((checked - began) / options.points * 1e3, 1),
        "ms_a_point_alone": round(alone * 1e3, 1),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
